"""The driver example: one entity, one view on a Kafka topic and a database table, one service."""

from datetime import timedelta

from feast import Entity, FeatureService, FeatureView, Field, FileSource, KafkaSource, ValueType
from feast.data_format import JsonFormat, ParquetFormat
from feast.types import Float32, Int32, Int64

driver = Entity(
    name="driver",
    join_keys=["driver_id"],
    value_type=ValueType.INT64,
    description="A driver, by its id",
    owner="data@example.com",
)

driver_stats_history = FileSource(
    name="driver_stats_history",
    path="../data/offline/driver_stats",
    file_format=ParquetFormat(),
    timestamp_field="datetime",
    created_timestamp_column="created",
    description="All that was accepted, in Parquet files: the offline store",
    owner="data@example.com",
)

driver_stats_events = KafkaSource(
    name="driver_stats_events",
    kafka_bootstrap_servers="127.0.0.1:9092",
    topic="drivers",
    timestamp_field="datetime",
    created_timestamp_column="created",
    message_format=JsonFormat(schema_json=""),
    batch_source=driver_stats_history,
    description="A driver's figures as they change, keyed by the driver",
    owner="data@example.com",
)

driver_stats = FeatureView(
    name="driver_stats",
    description="How a driver does: rates and trips, newest by event time",
    entities=[driver],
    ttl=timedelta(days=0),
    schema=[
        Field(name="driver_id", dtype=Int64),
        Field(
            name="conv_rate",
            dtype=Float32,
            description="Conversion rate",
            tags={"ge": "0", "le": "1", "nullable": "false"},
        ),
        Field(
            name="acc_rate",
            dtype=Float32,
            description="Acceptance rate",
            tags={"ge": "0", "le": "1", "nullable": "false"},
        ),
        Field(
            name="avg_daily_trips",
            dtype=Int32,
            description="Trips a day",
            tags={"ge": "0", "nullable": "false"},
        ),
    ],
    source=driver_stats_events,
    online=True,
    tags={"source_table": "driver_stats", "online_within_s": "1", "offline_within_s": "10"},
    owner="data@example.com",
)

driver_activity = FeatureService(
    name="driver_activity",
    features=[driver_stats],
    description="What a model of drivers asks for",
    owner="data@example.com",
)
