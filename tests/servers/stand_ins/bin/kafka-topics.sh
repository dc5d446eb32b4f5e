#!/bin/sh
exec java -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -Dorg.slf4j.simpleLogger.defaultLogLevel=warn -cp "$JARS" org.apache.kafka.tools.TopicCommand "$@"
