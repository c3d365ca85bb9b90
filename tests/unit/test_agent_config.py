"""The agent's settings: which source wins, and what is said about a bad value."""

from pathlib import Path

import pytest

from common.artifact.serving import GivenRoute
from common.errors import InvalidInput
from common.ids import ModelName
from edge_agent.config import AgentSettings, ModelSettings, default_data, load_settings


def test_a_flag_wins_over_a_variable_over_the_file_over_the_default(tmp_path: Path) -> None:
    file = tmp_path / "any.toml"
    file.write_text('inference_listen = "127.0.0.1:1"\nmqtt_bytes_max = 2\npoll_s = 5\nvariants = ["int8"]\n')
    environment = {"FERRY_AGENT_INFERENCE_LISTEN": "127.0.0.1:3", "FERRY_AGENT_MQTT_BYTES_MAX": "4", "FERRY_TOKEN": "x"}

    settings = load_settings({"inference_listen": "127.0.0.1:5", "name": "no setting"}, environment, str(file))

    assert (settings.inference_listen, settings.mqtt_bytes_max, settings.poll_s) == ("127.0.0.1:5", 4, 5.0)
    assert settings.variants == ("int8",)
    assert settings.telemetry_s == AgentSettings().telemetry_s


def test_the_file_in_the_data_folder_is_read_unless_another_is_named(tmp_path: Path) -> None:
    (tmp_path / "agent.toml").write_text("poll_s = 7")
    (tmp_path / "other.toml").write_text("poll_s = 8")

    assert load_settings({"data": str(tmp_path)}, {}).poll_s == 7.0
    assert load_settings({}, {"FERRY_AGENT_DATA": str(tmp_path)}).poll_s == 7.0
    named = {"FERRY_AGENT_DATA": str(tmp_path), "FERRY_AGENT_CONFIG": str(tmp_path / "other.toml")}
    assert load_settings({}, named).poll_s == 8.0
    assert load_settings({"data": str(tmp_path / "none")}, {}).poll_s == 0.0


def test_how_a_model_is_served_here_is_a_table_of_the_file_or_json_elsewhere(tmp_path: Path) -> None:
    file = tmp_path / "any.toml"
    file.write_text(
        "[models.detector]\ncache_bytes = 5\n"
        "[[models.detector.routes]]\nwhen = 'load.waiting > 2'\nmodel = 'small'\n"
        "[models.'text.type']\npadding = {}\ncold_start = 'lazy'\nidle_s = 60\n"
    )
    settings = load_settings({}, {}, str(file))
    assert settings.models == {
        "detector": ModelSettings(5, (GivenRoute("load.waiting > 2", ModelName("small")),)),
        "text.type": ModelSettings(padding={}, cold_start="lazy", idle_s=60.0),
    }
    elsewhere = load_settings({"models": '{"detector": {"cache_bytes": 0}}'}, {}, str(file))
    assert elsewhere.models == {"detector": ModelSettings(0)}


def test_lists_and_paths_can_be_given_as_text() -> None:
    settings = load_settings({"variants": "int8, fp16", "ca_file": "/etc/ca.pem"}, {"FERRY_AGENT_DATA": "/data"})

    assert settings.variants == ("int8", "fp16")
    assert (settings.data, settings.ca_file) == (Path("/data"), Path("/etc/ca.pem"))


def test_nothing_comes_after_leaving_the_variant_to_measurement() -> None:
    assert load_settings({"variants": "int8,auto"}, {}).variants == ("int8", "auto")
    with pytest.raises(InvalidInput, match=r"variants: 'auto' always finds a build.*put 'auto' last"):
        load_settings({"variants": "auto,int8"}, {})


@pytest.mark.parametrize(
    ("flags", "environment", "said"),
    [
        ({}, {"FERRY_AGENT_POLL_S": "soon"}, "FERRY_AGENT_POLL_S.*Expected `float`"),
        ({"heartbeat_s": "60"}, {}, "--heartbeat-s.*<= 20"),
        ({"telemetry_s": "0"}, {}, "--telemetry-s.*> 0"),
        ({"mqtt_bytes_max": "-1"}, {}, "--mqtt-bytes-max.*>= 0"),
        ({"log_level": "loud"}, {}, "--log-level.*Invalid enum value 'loud'"),
        ({"inference_listen": "8100"}, {}, "inference_listen.*HOST:PORT"),
        ({"inference_listen": "127.0.0.1:99999"}, {}, "inference_listen.*HOST:PORT"),
        ({"data": ""}, {}, "--data.*path"),
        ({"models": "{"}, {}, "--models.*JSON is malformed|--models.*truncated"),
        ({}, {"FERRY_AGENT_MODELS": '{"m": 5}'}, "FERRY_AGENT_MODELS.*object"),
        ({}, {"FERRY_AGENT_CONFIG": "/no/such/file"}, "config.*/no/such/file.*No such file"),
    ],
)
def test_a_bad_value_names_its_source(flags: dict[str, str], environment: dict[str, str], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        load_settings(flags, environment)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pol_s = 1", "unknown setting 'pol_s' .did you mean 'poll_s'"),
        ("poll_s = true", "poll_s: Expected `float`"),
        ("poll_s =", "not TOML"),
        ("variants = []", "variants"),
        ("data = 5", "data.*path"),
        ("[models.detector]\ncache_byte = 1", "models: .*unknown field `cache_byte`.*models"),
        ("[models.detector]\ncache_bytes = -1", "models: .*>= 0.*cache_bytes"),
        ("[models.Detector]\ncache_bytes = 1", "models: .*regex"),
        ("[models.detector]\nidle_s = 0", "models: .*> 0.*idle_s"),
        ("models = 'x'", "models: .*"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "agent.toml"
    file.write_text(text)

    with pytest.raises(InvalidInput, match=said) as raised:
        load_settings({}, {}, str(file))

    assert str(file) in str(raised.value)


def test_a_user_keeps_its_agent_in_its_own_state_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert default_data({"XDG_STATE_HOME": "/state"}) == Path("/state/ferry-agent")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert default_data({}) == Path("/var/lib/ferry-agent")


def test_download_settings_become_the_limits_of_downloads() -> None:
    limits = AgentSettings(download_idle_s=1, download_total_s=2, download_rate_bytes_per_s=3, mqtt_bytes_max=4)

    assert (limits.fetch_limits().idle_s, limits.fetch_limits().total_s) == (1, 2)
    assert (limits.fetch_limits().rate_bytes_per_s, limits.fetch_limits().mqtt_bytes_max) == (3, 4)
