#!/bin/sh
# Sets up the Debian guest's database for debian_data_test.py: run by examples/debian-guest/build.sh --prepare in the guest's root, where it takes
# seconds and not the minutes of a nested guest. Data checksums, so that PostgreSQL itself sees a page that is not what it wrote; segments of 1 MiB,
# as a nested guest takes long to write one of 16; checkpoints of its own every 30 s.
set -e
exec >&2
cluster=15/main
export PATH=/usr/lib/postgresql/15/bin:$PATH

pg_dropcluster 15 main
pg_createcluster 15 main -- --data-checksums --wal-segsize=1 --locale=C.UTF-8
cat >/etc/postgresql/$cluster/conf.d/test.conf <<'CONF'
jit = off                       # its compiler is removed below
shared_buffers = 32MB
checkpoint_timeout = 30s
max_wal_size = 32MB
log_line_prefix = '%t '
CONF
# The compiler of queries is half of what PostgreSQL brings along.
rm -f /usr/lib/*/libLLVM-*.so* /usr/lib/*/libz3.so*

as_postgres() { setpriv --reuid=postgres --regid=postgres --init-groups "$@"; }
mkdir -p /run/postgresql
chown postgres: /run/postgresql
cd /
as_postgres pg_ctl -w -D /var/lib/postgresql/$cluster -o "-c config_file=/etc/postgresql/$cluster/postgresql.conf" -l /tmp/prepare.log start ||
    { cat /tmp/prepare.log; exit 1; }
as_postgres psql -qAtc 'create extension amcheck'
as_postgres pgbench -i -q -s 1
as_postgres pg_ctl -w -D /var/lib/postgresql/$cluster stop
rm -f /tmp/prepare.log
