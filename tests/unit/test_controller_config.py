"""Settings: which source wins, and what is said about a bad value."""

from pathlib import Path

import pytest

from common.errors import InvalidInput
from common.settings import parse_address
from controller.config import Settings, load_settings


def test_a_flag_wins_over_a_variable_over_the_file_over_the_default(tmp_path: Path) -> None:
    file = tmp_path / "ferry.toml"
    file.write_text('listen = "127.0.0.1:1"\nbroker_listen = "127.0.0.1:2"\npoll_s = 5\n')
    environment = {"FERRY_LISTEN": "127.0.0.1:3", "FERRY_BROKER_LISTEN": "127.0.0.1:4", "FERRY_TOKEN": "not a setting"}
    settings = load_settings({"listen": "127.0.0.1:5"}, environment, str(file))
    assert (settings.listen, settings.broker_listen, settings.poll_s) == ("127.0.0.1:5", "127.0.0.1:4", 5.0)
    assert settings.heartbeat_s == Settings().heartbeat_s


def test_the_file_can_be_named_by_a_variable(tmp_path: Path) -> None:
    file = tmp_path / "ferry.toml"
    file.write_text("poll_s = 7.5")
    assert load_settings({}, {"FERRY_CONFIG": str(file)}).poll_s == 7.5


@pytest.mark.parametrize(
    ("flags", "environment", "said"),
    [
        ({}, {"FERRY_POLL_S": "soon"}, "FERRY_POLL_S.*Expected `float`"),
        ({"heartbeat_s": "60"}, {}, "--heartbeat-s.*<= 20"),
        ({"log_level": "loud"}, {}, "--log-level.*Invalid enum value 'loud'"),
        ({"listen": "8480"}, {}, "listen.*HOST:PORT"),
        ({"listen": "127.0.0.1:99999"}, {}, "listen.*HOST:PORT"),
        ({"listen": "0.0.0.0:8480"}, {}, "public_url.*--public-url"),
        ({"broker_listen": "[::]:1883"}, {}, "device_broker.*--device-broker"),
        ({"public_url": "ferry.example.org"}, {}, "public_url.*http"),
        ({"mosquitto_files": "/etc/mosquitto"}, {}, "mosquitto_files.*--broker"),
        ({}, {"FERRY_CONFIG": "/no/such/file"}, "config.*/no/such/file.*No such file"),
    ],
)
def test_a_bad_value_names_its_source(flags: dict[str, str], environment: dict[str, str], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        load_settings(flags, environment)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("listem = 'x'", "unknown setting 'listem' .did you mean 'listen'"),
        ("poll_s = '5'\n=", "not TOML"),
        ("poll_s = true", "poll_s"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "ferry.toml"
    file.write_text(text)
    with pytest.raises(InvalidInput, match=said) as raised:
        load_settings({}, {}, str(file))
    assert str(file) in str(raised.value)


def test_addresses_may_be_ipv6() -> None:
    assert parse_address("[::1]:80", "listen") == ("::1", 80)
    assert parse_address("localhost:0", "listen") == ("localhost", 0)
