"""The address of a broker, parsed once: `mqtt://USER:PASSWORD@HOST:PORT`, or `mqtts://` for TLS."""

from urllib.parse import unquote, urlsplit

import msgspec

from common.errors import InvalidInput

PORTS = {"mqtt": 1883, "mqtts": 8883}


class BrokerEndpoint(msgspec.Struct, frozen=True):
    """Where a broker listens and how to log in; both names are empty for a broker that asks for none."""

    host: str
    port: int
    tls: bool = False
    username: str = ""
    password: str = ""

    @classmethod
    def parse(cls, url: str, field: str = "broker") -> "BrokerEndpoint":
        """The endpoint that `url` names, or `InvalidInput`, which never repeats the password."""
        fix = "write mqtt://USER:PASSWORD@HOST:PORT, or mqtts:// for TLS; percent-encode special characters"
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise InvalidInput("not a URL with a port number", field=field, fix=fix) from error
        if parts.scheme not in PORTS or not parts.hostname or parts.path.strip("/") or parts.query:
            raise InvalidInput("not the URL of an MQTT broker", field=field, fix=fix)
        return cls(
            host=parts.hostname,
            port=port or PORTS[parts.scheme],
            tls=parts.scheme == "mqtts",
            username=unquote(parts.username or ""),
            password=unquote(parts.password or ""),
        )

    @property
    def url(self) -> str:
        """The address without the credentials, fit for logs and for devices."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"
