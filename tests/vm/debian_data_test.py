#!/usr/bin/env python3
"""What programs that check their own data find in a stock Debian guest after live checkpoints and reverts: fio --verify and PostgreSQL.

Run by tests/with-kvm. VMCP_GUEST names a folder made by

    examples/debian-guest/build.sh --with fio,postgresql,postgresql-contrib --prepare tests/vm/debian_prepare.sh FOLDER

for fio alone `--with fio` does. VMCP_TEST_DEBIAN_CHECKPOINTS is how many live checkpoints a test takes (fio 5, PostgreSQL 3): with 50, which is the whole
acceptance test, fio sees 20 reverts, and the disks of all PostgreSQL's checkpoints are also started without memory (else those of ALONE).
"""

import os
import random
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import vmcp_test  # noqa: E402
from debian_guest import boot, check_log, said  # noqa: E402
from vmcp_test import check, check_equal  # noqa: E402

CHECKPOINTS = int(os.environ.get("VMCP_TEST_DEBIAN_CHECKPOINTS", "0"))  # 0: as many as the suite has time for
FIO_CHECKPOINTS = CHECKPOINTS or 5
FIO_REVERTS = FIO_CHECKPOINTS * 2 // 5
DATABASE_CHECKPOINTS = CHECKPOINTS or 3
ALONE = CHECKPOINTS if CHECKPOINTS >= 50 else 2
EVERY_S = 2.0
PATIENT_S = 400  # a guest under load on an emulated processor on a busy host takes a minute for what takes a second
PAIRS = 12  # what fits a VM of 26 disks


def wait_until(what, condition, seconds=PATIENT_S):
    deadline = time.monotonic() + seconds
    while not condition():
        check(time.monotonic() < deadline, f"not within {seconds} s: {what}")
        time.sleep(0.5)


def take(env, name="debian"):
    started = time.monotonic()
    taken = env.vmcp_json("checkpoint", "--live", name, timeout=300)
    print(f"  checkpoint {taken['id']}: {time.monotonic() - started:.1f} s, pause {taken['pause_ns'] / 1e6:.2f} ms, "
          f"writes in flight {sum(disk['inflight_writes'] for disk in taken['disks'])}, "
          f"reads {sum(disk['inflight_reads'] for disk in taken['disks'])}", flush=True)
    return taken["id"]


# A pass writes 3 MiB all over the disk with up to 16 requests in flight and reads it back, and a file through the page cache beside it. Every
# block carries a checksum, its offset and the pass's seed. The numbers of passes that ended well, and of those that did not, are in memory.
FIO = """
mkdir -p /run/fio
cat >/run/fio/job <<'JOB'
[global]
verify=crc32c
verify_fatal=1
thread=1
[disk]
filename=/dev/vdb
direct=1
ioengine=libaio
iodepth=16
rw=randwrite
bssplit=512/10:4k/40:16k/30:64k/20
verify_interval=512
size=64m
io_size=3m
[file]
filename=/var/tmp/fio
rw=randwrite
bs=4k
size=2m
io_size=512k
fsync=32
JOB
passes() {
    n=0
    while [ ! -e /run/fio/stop ]; do
        if ! fio --minimal --randseed=$((n * 1000 + $(date +%s))) /run/fio/job >/run/fio/out 2>&1; then
            cp /run/fio/out /run/fio/failed
            return
        fi
        n=$((n + 1))
        echo $n >/run/fio/passed
    done
}
echo 0 >/run/fio/passed
passes & echo $! >/run/fio/pid
"""


def test_fio(env):
    """fio goes on verifying what it writes, across live checkpoints and reverts to new and old ones."""
    console = boot(env, disks=[f"[disk data]\npath = {env.image('data.qcow2', '64M')}"])
    console.check(FIO, PATIENT_S)

    def passed():
        check_equal(said(console, "cat /run/fio/failed 2>/dev/null; kill -0 $(cat /run/fio/pid)", PATIENT_S), "", "fio failed")
        return int(said(console, "cat /run/fio/passed", PATIENT_S))

    wait_until("fio's first pass", lambda: passed() > 0)
    rng = random.Random(1)
    ids = []
    for n in range(FIO_CHECKPOINTS):
        ids.append(take(env))
        if (n + 1) * FIO_REVERTS // FIO_CHECKPOINTS > n * FIO_REVERTS // FIO_CHECKPOINTS:
            target = ids[-1] if n % 2 else rng.choice(ids)
            env.vmcp_json("revert", target, timeout=120)
            console.sync(PATIENT_S)
            before = passed()
            wait_until("fio's next pass", lambda before=before: passed() > before)  # the one at the checkpoint, read back to its end
            print(f"  reverted to {target}, {before} passes", flush=True)
    console.check(": >/run/fio/stop; wait", PATIENT_S)
    check_equal(said(console, "cat /run/fio/failed 2>/dev/null; true", PATIENT_S), "", "fio failed")
    print(f"fio: {said(console, 'cat /run/fio/passed')} passes in the last line of history, {len(ids)} checkpoints, {FIO_REVERTS} reverts", flush=True)
    check_log(console, "under fio")
    env.vmcp("kill", "debian")


# The database's folder is on the root disk, its log of writes on a disk of its own: started without memory it needs both at the same instant.
POSTGRES = """
pgdata=/var/lib/postgresql/15/main log=/var/log/postgresql/log PATH=$PATH:/usr/lib/postgresql/15/bin
cd /
in_root() { chroot "${root:-/}" setpriv --reuid=postgres --regid=postgres --init-groups env PATH=$PATH "$@"; }
folders() {
    mkdir -p $root/run/postgresql $root/var/log/postgresql
    chown --reference=$root$pgdata $root/run/postgresql $root/var/log/postgresql
}
server() { in_root pg_ctl -w -t 240 -D $pgdata -o '-c config_file=/etc/postgresql/15/main/postgresql.conf' -l $log "$@" >/run/pg_ctl 2>&1 || cat /run/pg_ctl; }
ask() { in_root psql -qAtX -P pager=off -c "$1"; }
balances() {
    ask 'select (select sum(abalance) from pgbench_accounts), (select sum(tbalance) from pgbench_tellers),
        (select sum(bbalance) from pgbench_branches), (select coalesce(sum(delta), 0) from pgbench_history),
        (select count(*) from pgbench_history)'
}
complaints() { grep -E ' (WARNING|ERROR|FATAL|PANIC): ' $root$log || :; }
# Prints the balances; whatever else it prints is a fault.
inspect() { balances; in_root pg_amcheck --heapallindexed --database=postgres 2>&1; complaints; }
# The database of the disks $1 (root) and $2 (log of writes), which no memory goes with.
alone() {
    root=/mnt
    mount $1 $root && mount $2 $root/srv/wal && mount --bind /dev $root/dev && mount -t tmpfs none $root/dev/shm &&
        mount -t proc none $root/proc && mount -t tmpfs none $root/run || return
    folders
    : >$root$log && chown --reference=$root$pgdata $root$log
    server start
    inspect
    grep -q 'was not properly shut down' $root$log || echo 'it was shut down'
    server -m fast stop
    umount $root/run $root/proc $root/dev/shm $root/dev $root/srv/wal $root
    root=
}
"""
MOVE_WAL = """
mkfs.ext4 -q -E nodiscard /dev/vdb && mkdir -p /srv/wal && mount /dev/vdb /srv/wal && mv $pgdata/pg_wal /srv/wal/pg_wal &&
    ln -s /srv/wal/pg_wal $pgdata/pg_wal && folders && server start && sync
"""


def inspected(text, committed, what):
    """text: what inspect() printed. Returns the number of transactions in the database."""
    first, *rest = text.splitlines() or [""]
    check(not rest, f"{what}: the database complains: {text}")
    fields = first.split("|")
    check(len(fields) == 5 and len(set(fields[:4])) == 1, f"{what}: the balances differ: {text}")
    check(int(fields[4]) >= committed, f"{what}: {committed} transactions were committed before, {fields[4]} are there")
    return int(fields[4])


def start_alone(env, checkpoints):
    """checkpoints: (id, transactions committed before). Another VM starts the database from the disks of each, the first written out by `disk export`."""
    disks = []
    for number, (name, _) in enumerate(checkpoints):
        for disk in env.vmcp_json("show", name)["disks"]:
            key, file = "base", os.path.join(env.store, "layers", f"{disk['layer']}.{disk['format']}")
            if number == 0:
                key, file = "path", env.path(f"exported-{name}-{disk['name']}.raw")
                env.vmcp("disk", "export", f"{name}:{disk['name']}", file, "--format", "raw", timeout=300)
            disks.append(f"[disk {disk['name']}{number}]\n{key} = {file}")
    console = boot(env, name="alone", root="alone.qcow2", disks=disks)
    console.check(POSTGRES, PATIENT_S)
    for number, (name, committed) in enumerate(checkpoints):
        started = time.monotonic()
        devices = " ".join(f"/dev/vd{chr(ord('b') + 2 * number + n)}" for n in range(2))
        count = inspected(said(console, f"alone {devices}", PATIENT_S), committed, f"the disks of {name} alone")
        print(f"  {name} from its disks alone: {count} transactions, {committed} known before ({time.monotonic() - started:.1f} s)", flush=True)
    check_log(console, "with the disks of checkpoints")
    env.vmcp("kill", "alone")


def test_postgresql(env):
    """PostgreSQL under pgbench: from each checkpoint it goes on in memory and starts from the disks alone, nothing committed lost, nothing torn."""
    console = boot(env, disks=[f"[disk wal]\npath = {env.image('wal.qcow2', '128M')}"])
    console.check(POSTGRES, PATIENT_S)
    check_equal(said(console, MOVE_WAL, PATIENT_S), "", "starting the database")
    console.check("in_root pgbench -n -c 4 -T 100000 >/run/pgbench 2>&1 & echo $! >/run/pgbench.pid", PATIENT_S)

    def transactions():
        return int(said(console, "ask 'select count(*) from pgbench_history'", PATIENT_S))

    wait_until("pgbench's first transactions", lambda: transactions() > 0)
    checkpoints = []
    started = time.monotonic()
    for n in range(DATABASE_CHECKPOINTS):
        time.sleep(max(0.0, started + n * EVERY_S - time.monotonic()))
        committed = transactions()
        checkpoints.append((take(env), committed))
    print(f"  {len(checkpoints)} checkpoints in {time.monotonic() - started:.1f} s", flush=True)
    order = random.Random(2).sample(checkpoints, len(checkpoints))
    for name, committed in order:
        began = time.monotonic()
        env.vmcp_json("revert", name, timeout=120)
        console.sync(PATIENT_S)
        count = inspected(said(console, "inspect", PATIENT_S), committed, f"after the revert to {name}")
        wait_until("a transaction after the revert", lambda count=count: transactions() > count)
        check_equal(console.run("kill -0 $(cat /run/pgbench.pid)")[0], 0, "pgbench is gone")
        print(f"  reverted to {name}: {count} transactions, {committed} known before ({time.monotonic() - began:.1f} s)", flush=True)
    check_log(console, "under pgbench")
    env.vmcp("kill", "debian")
    # The last one reverted to has a line of history of its own above it by now: its disks must not show it.
    alone = checkpoints if ALONE >= len(checkpoints) else [order[0], order[-1]]
    for first in range(0, len(alone), PAIRS):
        start_alone(env, alone[first:first + PAIRS])


if __name__ == "__main__":
    vmcp_test.main(__name__)
