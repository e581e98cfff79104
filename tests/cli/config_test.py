#!/usr/bin/env python3
"""`config init` and `run --dry-run`: what the first writes is all of docs/guest-cfg.md, and the second takes it. No KVM is needed."""

import os
import re
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "lib"))
import vmcp_test  # noqa: E402
from vmcp_test import check, check_equal  # noqa: E402

GUIDE = os.path.join(HERE, "..", "..", "docs", "guest-cfg.md")


def documented():
    """{section: keys} as the tables of the guide have them."""
    found, section = {}, None
    with open(GUIDE, encoding="utf-8") as file:
        for line in file:
            heading = re.match(r"## \[(\w+)", line)
            if line.startswith("## "):
                section = heading.group(1) if heading else None
            row = re.match(r"\| ((?:`\w+`(?:, )?)+) \|", line)
            if section and row:
                found.setdefault(section, set()).update(re.findall(r"`(\w+)`", row.group(1)))
    check_equal(sorted(found), ["checkpoint", "disk", "net", "vm"], "sections of the guide")
    return found


def written(text):
    found, section = {}, None
    for line in text.splitlines():
        heading = re.match(r"(?:# )?\[(\w+)", line)
        key = re.match(r"(?:# )?(\w+) = ", line)
        if heading:
            section = heading.group(1)
        elif key:
            found.setdefault(section, set()).add(key.group(1))
    return found


def test_init_has_every_key(env):
    text = env.vmcp("config", "init", "-").out
    check_equal(written(text), documented(), "keys")
    check(all(len(line) < 120 for line in text.splitlines()), "a long line")


def test_all_of_it_is_right(env):
    """With every comment that is a setting taken away it is a machine still."""
    for name in ("vmlinuz", "initrd.img", "root.qcow2", "debian.qcow2", "seed.iso"):
        env.write(name, "x" * 4096)
    text = env.vmcp("config", "init", "-").out
    everything = re.sub(r"(?m)^# (\[|\w+ = )", r"\1", text)
    config = env.write("all.cfg", everything)
    plan = env.vmcp_json("run", "--dry-run", config)
    check_equal((plan["vm"], plan["memory_bytes"], plan["cpus"], plan["every_ns"], plan["keep"]), ("web", 512 << 20, 1, 30 * 10**9, 20), "the machine")
    check_equal([disk["name"] for disk in plan["disks"]], ["root", "data", "seed"], "disks")
    check_equal([net["mode"] for net in plan["nets"]], ["user", "tap", "bridge", "libvirt"], "nets")
    # What it prints is that machine again.
    again = env.vmcp_json("run", "--dry-run", env.write("again.cfg", env.vmcp("run", "-n", config).out))
    check_equal(again, plan, "the machine, read again")
    check(not os.path.exists(env.store), "a dry run made a store")


def test_options_and_files(env):
    env.write("bzImage", "x")
    config = env.path("my.cfg")
    env.vmcp("config", "init", config, "--name", "db", "--memory", "2G", "--cpus", "4", "--kernel", "bzImage")
    plan = env.vmcp_json("run", "--dry-run", config, "--every", "5s")
    check_equal((plan["vm"], plan["memory_bytes"], plan["cpus"], plan["kernel"], plan["every_ns"]), ("db", 2 << 30, 4, env.path("bzImage"), 5 * 10**9), "plan")
    refused = env.vmcp("config", "init", config, status=4)
    check("is there already" in refused.err and "hint: " in refused.err, str(refused))
    env.vmcp("config", "init", config, "--force")
    check("name = web" in open(config, encoding="utf-8").read(), "not replaced")
    check("info" in env.vmcp("config", "nosuch", status=2).err or "init" in env.vmcp("config", "nosuch", status=2).err, "a wrong word")


def test_dry_run_finds_what_is_wrong(env):
    result = env.vmcp("run", "--dry-run", env.write("bad.cfg", "[vm]\nmemroy = 1G\n"), status=2)
    check("did you mean 'memory'" in result.err, str(result))
    result = env.vmcp("--json", "run", "--dry-run", "--from", "nosuch", status=3)
    check_equal(result.json["error"]["code"], "not-found", "code")


if __name__ == "__main__":
    vmcp_test.main(__name__)
