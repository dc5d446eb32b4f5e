-- The source table of the driver example, made with the database. Bring your own: HEADRACE_SOURCE_URL names it.
CREATE TABLE IF NOT EXISTS driver_stats (
    driver_id       bigint,
    conv_rate       real,
    acc_rate        real,
    avg_daily_trips integer,
    datetime        timestamptz,
    created         timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX IF NOT EXISTS driver_stats_created ON driver_stats (created);
