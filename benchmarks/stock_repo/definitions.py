"""The peer's repository: the same view on Feast's own stores, fed by `FeatureStore.push`."""

from datetime import timedelta

from feast import Entity, FeatureView, Field, FileSource, PushSource, ValueType
from feast.data_format import ParquetFormat
from feast.types import Float32, Int32, Int64

driver = Entity(name="driver", join_keys=["driver_id"], value_type=ValueType.INT64)

driver_stats = FeatureView(
    name="driver_stats",
    entities=[driver],
    ttl=timedelta(days=0),
    schema=[
        Field(name="driver_id", dtype=Int64),
        Field(name="conv_rate", dtype=Float32),
        Field(name="acc_rate", dtype=Float32),
        Field(name="avg_daily_trips", dtype=Int32),
    ],
    source=PushSource(
        name="driver_stats_push",
        batch_source=FileSource(
            name="driver_stats_file",
            path="driver_stats.parquet",
            file_format=ParquetFormat(),
            timestamp_field="datetime",
            created_timestamp_column="created",
        ),
    ),
)
