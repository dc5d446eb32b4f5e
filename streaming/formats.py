"""The message formats of the stream: one decoder a view, made by one function, all with the same interface."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence

from headrace.contract import ViewContract
from headrace.errors import ConfigError
from streaming.avro import AvroDecoder, NotYetKnownError
from streaming.decode import Decoded, JsonDecoder
from streaming.schema_registry import SchemaRegistry

Decoder = Callable[[Sequence[bytes | None]], Decoded]
"""Values of records to columns. Never raises for what is in them; a `TransientError` may pass, and nothing is lost."""


def decoder_of(contract: ViewContract, registry: SchemaRegistry | None) -> Decoder:
    """The decoder of a view's message format.

    Args:
        registry: where the schemas are that records name; None if they name none. JSON has no use for it.

    Raises:
        ConfigError: the format is not served, or its schema does not give what the view needs.
    """
    if contract.message_format in (None, "json"):
        return JsonDecoder(contract)
    if contract.message_format == "avro":
        return AvroDecoder(contract, registry)
    msg = f"feature view `{contract.name}`: its KafkaSource has the message format `{contract.message_format}`; "
    if contract.message_format == "proto":
        msg += (
            "a ProtoFormat names a Java class, which Python cannot load, and a field that is absent from a Protobuf "
            "message reads as 0, so that a record cut short would be taken for good; "
        )
    msg += "expected JsonFormat or AvroFormat: send one of these, or convert the topic before the stream reads it"
    raise ConfigError(msg)


def patiently(decoder: Decoder) -> Decoder:
    """A decoder that waits by itself, for the seconds that it takes, until a registry's "unknown" is certain."""

    def decode(values: Sequence[bytes | None]) -> Decoded:
        while True:
            try:
                return decoder(values)
            except NotYetKnownError:
                time.sleep(0.2)

    return decode


def bytes_format(contract: ViewContract, registry: SchemaRegistry | None) -> str:
    """What the bytes of a record are, in words: the same for all views of a topic, which read the same bytes."""
    name = contract.message_format or "json"
    if name == "avro" and registry is None:
        return f"avro {json.dumps(json.loads(contract.message_schema or 'null'), sort_keys=True)}"
    return name
