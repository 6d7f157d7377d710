#!/bin/sh
# Puts the jars of Apache Kafka and what it needs from Maven Central into DIRECTORY/VERSION/jars,
# for trying and testing. Needs Java 17 and Maven. Usage: kafka.sh DIRECTORY VERSION
set -eu

directory=$1
version=$2
[ ! -d "$directory/$version/jars" ] || exit 0
for program in java mvn; do
    command -v $program >/dev/null || {
        echo "$program is missing: apt-get install default-jre-headless maven" >&2
        exit 1
    }
done
mkdir -p "$directory"
# Made aside and renamed, so that two installers cannot see each other's half.
aside=$directory/.$version.$$
mkdir "$aside"
trap 'rm -rf "$aside"' EXIT
cat >"$aside/pom.xml" <<EOF
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>walferry</groupId>
  <artifactId>kafka</artifactId>
  <version>1</version>
  <packaging>pom</packaging>
  <dependencies>
    <dependency>
      <groupId>org.apache.kafka</groupId>
      <artifactId>kafka_2.13</artifactId>
      <version>$version</version>
    </dependency>
    <dependency>
      <groupId>org.slf4j</groupId>
      <artifactId>slf4j-reload4j</artifactId>
      <version>1.7.36</version>
    </dependency>
  </dependencies>
</project>
EOF
mvn -q -B -f "$aside/pom.xml" dependency:copy-dependencies -DincludeScope=runtime \
    "-DoutputDirectory=$aside/jars" >&2
chmod -R a+rX "$aside"
mkdir -p "$directory/$version"
# Losing the race to another installer is as good as winning it.
mv -T "$aside/jars" "$directory/$version/jars" 2>/dev/null || true
[ -d "$directory/$version/jars" ]
