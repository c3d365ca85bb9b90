"""What brokers are told about users, as text: NATS permissions, mosquitto passwords and rules, broker URLs."""

import base64
import json
from pathlib import Path

import pytest

from common.errors import InvalidInput
from common.ids import DeviceId
from controller.broker.endpoint import BrokerEndpoint
from controller.broker.mosquitto import acl, hashed
from controller.broker.nats_config import ServerLimits, server_config


def test_a_device_of_the_nats_server_has_its_own_subjects_and_no_others() -> None:
    text = server_config(
        folder=Path("/data"), host="127.0.0.1", port=1883, controller_hash="$2b$c", devices={DeviceId("d1"): "$2b$d"},
        limits=ServerLimits(),
    )  # fmt: skip
    controller, device = json.loads(text)["authorization"]["users"]
    assert device["permissions"] == {
        "publish": ["fc.v1.d.d1.state", "fc.v1.d.d1.hb", "fc.v1.d.d1.tel", "fc.v1.d.d1.reported", "fc.v1.d.d1.rq"],
        "subscribe": ["fc.v1.d.d1", "fc.v1.d.d1.>"],
    }
    assert controller["permissions"]["publish"] == ["fc.v1.d.*.desired", "fc.v1.d.*.dl"]
    assert {user["user"]: user["password"] for user in (controller, device)} == {"_controller": "$2b$c", "d1": "$2b$d"}
    assert all(user["allowed_connection_types"] == ["MQTT"] for user in (controller, device))


def test_a_mosquitto_password_is_what_mosquitto_passwd_writes() -> None:
    """The line comes from mosquitto_passwd 2.0.11 and the password `one`."""
    key = "7+6BwTmb5DPkLzjgnB+BApe6uuiJDbBZTjQbxohpxwPLKGmvwVjPcmqNZiyEjqrkViSBC/yLjc5RV/amcuYbKQ=="
    assert hashed("one", base64.b64decode("9uuFq4bz3KIxjscO")) == f"$7$101$9uuFq4bz3KIxjscO${key}"
    assert hashed("one") != hashed("one")


def test_mosquitto_s_rules_do_not_name_devices() -> None:
    rules = acl("_controller").splitlines()
    assert "user _controller" in rules
    assert "topic write fc/v1/d/+/desired" in rules
    assert "topic read fc/v1/d/+/reported" in rules
    assert "pattern write fc/v1/d/%u/reported" in rules
    assert "pattern read fc/v1/d/%u/desired" in rules
    assert not [rule for rule in rules if rule.startswith("pattern write") and rule.endswith(("desired", "dl", "#"))]


def test_a_broker_url_is_taken_apart() -> None:
    endpoint = BrokerEndpoint.parse("mqtts://_controller:p%40ss@broker.example.org")
    assert endpoint == BrokerEndpoint("broker.example.org", 8883, True, "_controller", "p@ss")
    assert endpoint.url == "mqtts://broker.example.org:8883"
    assert BrokerEndpoint.parse("mqtt://[::1]:1884").url == "mqtt://[::1]:1884"


@pytest.mark.parametrize(
    "url", ["broker:1883", "http://u:s3cret@h", "mqtt://", "mqtt://u:s3cret@h:port", "mqtt://u:s3cret@h/topic", ""]
)
def test_a_bad_broker_url_is_refused_without_repeating_its_password(url: str) -> None:
    with pytest.raises(InvalidInput, match="mqtt://USER:PASSWORD@HOST:PORT") as raised:
        BrokerEndpoint.parse(url)
    assert "s3cret" not in str(raised.value)
