#!/usr/bin/env python3
"""libvirt's domains, networks and volumes: every example that libvirt ships, its test driver, and a real libvirtd."""

import concurrent.futures
import glob
import html
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import libvirt_host  # noqa: E402
import vmcp_test  # noqa: E402
from guest_console import GuestConsole  # noqa: E402
from libvirt_host import Daemon, need, run, virsh  # noqa: E402
from vmcp_test import Skip, Tiny, check, check_equal  # noqa: E402

DOCUMENTS = "/usr/share/doc/libvirt-doc"
LIBRARIES = "/usr/lib/x86_64-linux-gnu"


def one_error(result, *words):
    """The last two lines of stderr are the error and its hint; before them there may be lines on what is not honoured."""
    lines = result.err.strip().split("\n")
    check(len(lines) >= 2 and lines[-2].startswith("vmcp: ") and lines[-1].startswith("hint: "), f"no error with a hint: {result}")
    check(all(line.startswith("vmcp: ") for line in lines[:-1]), f"strange lines: {result}")
    for word in words:
        check(word in lines[-2], f"'{word}' is not in the error: {result}")


# --- reading

def documented():
    """(name, XML) of each example: the files, and what the manual shows, whole domains and single elements."""
    for path in sorted(glob.glob(f"{DOCUMENTS}/examples/**/*.xml", recursive=True)):
        with open(path, encoding="utf-8") as file:
            yield path, file.read()
    for path in sorted(glob.glob(f"{DOCUMENTS}/html/**/*.html", recursive=True)):
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read()
        for number, block in enumerate(re.findall(r"<pre[^>]*>(.*?)</pre>", text, re.S)):
            block = html.unescape(re.sub(r"<[^>]+>", "", block))
            if re.match(r"\s*(\.\.\.)?\s*<[a-z]", block):
                yield f"{path} {number}", block


DEVICES = set("disk interface serial console parallel channel rng memballoon vsock graphics video sound audio hostdev controller filesystem input tpm watchdog "
              "redirdev smartcard hub panic shmem memory iommu crypto lease redirfilter nvram".split())
WHOLE = ("<domain type='kvm'>{}<name>example</name><memory unit='MiB'>128</memory><os><type arch='x86_64'>hvm</type><kernel>/boot/vmlinuz</kernel></os>"
         "<devices>{}</devices></domain>")


def in_a_domain(block):
    """What an example shows of a domain, as a whole one that can start; several, where it shows several. Ellipses are cut out."""
    block = re.sub(r"<\?xml[^>]*\?>|<!--.*?-->", "", block, flags=re.S)
    block = re.sub(r"^\s*\.\.\.\s*$", "", block, flags=re.M)
    try:
        elements = list(ElementTree.fromstring(f"<all>{block}</all>"))
    except ElementTree.ParseError:
        return
    for element in elements:
        parts = list(element) if element.tag in ("domain", "devices") else [element]
        for part in [inner for one in parts for inner in (list(one) if one.tag == "devices" else [one])]:
            if part.tag in ("name", "memory", "os", "domain") and element.tag == "domain":
                continue
            text = ElementTree.tostring(part, encoding="unicode")
            yield WHOLE.format(*(("", text) if part.tag in DEVICES else (text, "")))


def test_every_documented_example(env):
    """Each becomes a guest.cfg or is refused in one line; nothing that it says is passed over in silence by a crash."""
    if not os.path.isdir(f"{DOCUMENTS}/html"):
        raise Skip(f"{DOCUMENTS} is not there: libvirt-doc is not installed, or dpkg leaves documents out")
    texts = {}
    for name, block in documented():
        texts[block] = name
        for number, text in enumerate(in_a_domain(block)):
            texts.setdefault(text, f"{name}, element {number}")
    converted = refused = told = 0

    def convert(item):
        number, (text, name) = item
        return text, name, env.vmcp("config", "convert", env.write(f"{number}example.xml", text), status=None)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(convert, enumerate(texts.items())))
    for text, name, result in results:
        check(result.status in (0, 2), f"{name}: {text}\n{result}")
        if result.status:
            one_error(result, "example.xml")
            check_equal(result.out, "", f"{name}: stdout")
            refused += 1
            continue
        check(result.out.startswith("[vm]\n") and "\nkernel = " in result.out, f"{name}: {text}\n{result}")
        lines = result.err.strip().split("\n") if result.err else []
        check(all(re.match(r"vmcp: .*example\.xml:\d+: ", line) for line in lines), f"{name}: {result}")
        told += len(lines)
        converted += 1
    print(f"  {len(texts)} examples: {converted} converted with {told} lines on what is not honoured, {refused} refused", flush=True)
    check(converted >= 200 and refused >= 50, f"{converted} converted, {refused} refused: where are the examples?")


def domain_xml(env, name="tiny", disks="", devices="", cmdline="report=0", memory=128):
    return (f"<domain type='kvm'><name>{name}</name><memory unit='MiB'>{memory}</memory><vcpu>1</vcpu><os><type arch='x86_64' machine='pc'>hvm</type>"
            f"<kernel>{env.tiny}</kernel><cmdline>{cmdline}</cmdline></os><features><acpi/><apic/></features><devices>{disks}{devices}"
            f"<serial type='pty'><target port='0'/></serial><memballoon model='none'/></devices></domain>")


def disk_xml(path, dev="vda", kind="qcow2"):
    return f"<disk type='file' device='disk'><driver name='qemu' type='{kind}'/><source file='{path}'/><target dev='{dev}' bus='virtio'/></disk>"


BUSY = "set=16M rate=2000 disk=1 disk_blocks=512 report=0"


def test_run_domain_xml(env):
    """A domain with two disks, run from its file: checkpoint, damage, revert."""
    first, second = env.image("a b.qcow2", "16M"), env.image("second.raw", "16M", "raw")
    path = env.write("tiny.xml", domain_xml(env, disks=disk_xml(first) + disk_xml(second, "vdb", "raw"), cmdline=BUSY,
                                            devices="<graphics type='vnc'/><interface type='user'><model type='virtio'/></interface>"))
    with open(path, encoding="utf-8") as file:
        text = file.read()
    env.write("tiny.xml", text.replace("<name>", "<uuid>4DEA22B31D52-D8F3-2516-782e98ab3fa0</uuid><name>"))
    guest = env.spawn_tiny("run", path)
    check("graphics: 'vnc' is not honoured" in env.stderr_text() and "vdb: raw" in env.stderr_text(), f"not told: {env.stderr_text()}")
    for number in range(3):
        taken = env.vmcp_json("checkpoint", "--live", "tiny")
        guest.check()
        env.vmcp("revert", taken["id"])
        guest.check()
        guest.epoch(number + 1)
    uuid = "4dea22b3-1d52-d8f3-2516-782e98ab3fa0"
    check_equal(env.vmcp_json("show", taken["id"])["vm_uuid"], uuid, "the domain's uuid, in the checkpoint")
    check_equal(env.vmcp_json("show", "tiny", "--resources")["uuid"], uuid, "and of the VM")
    check(f"<uuid>{uuid}</uuid>" in env.vmcp("config", "export", "--libvirt", "tiny").out, "and exported")
    env.vmcp("kill", "tiny")
    run("qemu-img", "check", first)
    # Its raw disk is a qcow2 image by now; the domain, which still says raw, is not run on it.
    one_error(env.vmcp("run", path, status=2), "second.raw", "is a qcow2 image")


def test_what_cannot_be_run(env):
    one_error(env.vmcp("run", env.path("nothere.xml"), status=3), "nothere.xml")
    one_error(env.vmcp("run", env.write("a.xml", domain_xml(env, disks=disk_xml("/nowhere/disk"))), status=3), "/nowhere/disk")
    one_error(env.vmcp("run", env.write("b.xml", "<domain><name>x</nome></domain>"), status=2), "b.xml:1")
    one_error(env.vmcp("run", env.write("c.xml", domain_xml(env).replace(env.tiny, "/nowhere/kernel")), status=3), "/nowhere/kernel")
    one_error(env.vmcp("config", "convert", env.tiny, status=2), "tiny.elf")
    one_error(env.vmcp("config", "export", "--libvirt", "nosuch", status=None))


# --- libvirt's test driver

def test_driver(env):
    need("virsh")
    one_error(env.vmcp("run", "--connect", "test:///default", "nosuch", status=3), "nosuch")
    one_error(env.vmcp("run", "--connect", "test:///default", "test", status=4), "test")  # it runs
    one_error(env.vmcp("config", "convert", "--connect", "test:///default", "test", status=2), "i686")
    for uri in ("qemu", "test://", "a b", "qemu+nosuch:///system"):
        one_error(env.vmcp("run", "--connect", uri, "test", status=2), uri)
    one_error(env.vmcp("run", "--connect", "test:///default", status=2))
    one_error(env.vmcp("run", "--connect", "test:///default", "--from", "x", status=2))


def node(env, domains="", pool_path="/nowhere", volumes=""):
    """A host of the test driver, with a pool and a network."""
    text = (f"<node>{domains}<network><name>lan</name><bridge name='virbr7'/></network>"
            f"<network><name>vepa</name><forward mode='vepa'><interface dev='eth0'/></forward></network>"
            f"<pool type='dir'><name>images</name><target><path>{pool_path}</path></target>{volumes}</pool></node>")
    return "test://" + env.write("node.xml", text)


def test_volumes(env):
    """path = POOL:VOLUME, and a file that looks like one."""
    os.mkdir(env.path("pool"))
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", env.path("pool/one.qcow2"), "16M"], check=True)
    uri = node(env, pool_path=env.path("pool"),
               volumes="".join(f"<volume type='file'><name>{name}</name><capacity>16777216</capacity><target><path>{env.path('pool')}/{name}</path></target></volume>"
                               for name in ("one.qcow2", "gone.qcow2")))
    config = "[vm]\nname = tiny\nmemory = 128M\nkernel = {}\ncmdline = " + BUSY + "\nlibvirt = " + uri + "\n[disk data]\npath = {}\n"

    guest = env.spawn_tiny("run", env.write("tiny.cfg", config.format(env.tiny, "images:one.qcow2")))
    guest.check()
    taken = env.vmcp_json("checkpoint", "--live", "tiny")
    shown = env.vmcp_json("show", taken["id"])
    check("images:" not in str(shown.get("config", "")), f"a checkpoint names a volume instead of its file: {shown}")
    env.vmcp("revert", taken["id"])
    guest.check()
    env.vmcp("kill", "tiny")
    run("qemu-img", "check", env.path("pool/one.qcow2"))

    for path, status, word in (("images:nosuch", 3, "nosuch"), ("nopool:one.qcow2", 3, "nopool"), ("images:gone.qcow2", 3, "gone.qcow2")):
        one_error(env.vmcp("run", env.write("bad.cfg", config.format(env.tiny, path)), status=status), word, "bad.cfg")
    plain = env.image("a:b.qcow2", "16M")
    guest = env.spawn_tiny("run", env.write("tiny.cfg", config.format(env.tiny, "a:b.qcow2").replace(uri, "test:///nowhere")))
    guest.check()
    env.vmcp("kill", "tiny")
    run("qemu-img", "check", plain)


def test_networks_that_are_none(env):
    need("virsh")
    config = "[vm]\nname = tiny\nmemory = 128M\nkernel = {}\nlibvirt = {}\n[net lan]\nmode = libvirt\nnetwork = {}\n"
    uri = node(env)
    for network, status, word in (("nosuch", 3, "nosuch"), ("vepa", 2, "no bridge"), ("lan", 3, "virbr7")):
        one_error(env.vmcp("run", env.write("a.cfg", config.format(env.tiny, uri, network)), status=status), word)
    for uri in ("qemu+ext:///?command=/bin/true", "qemu+ssh://host/system", "qemu:///system?x=y"):
        one_error(env.vmcp("run", env.write("a.cfg", config.format(env.tiny, uri, "lan")), status=2), "libvirt", "a.cfg:5")
    one_error(env.vmcp("run", env.write("a.cfg", config.format(env.tiny, "test:///default", "lan").replace("network = lan\n", "")), status=2), "network")


def test_without_libraries(env):
    """Neither library is needed until it is asked for."""
    script = "set -e; for l in libvirt.so.0 libxml2.so.2; do mount --bind /dev/null $(readlink -f %s/$l); done; exec \"$@\"" % LIBRARIES
    xml, cfg = env.write("tiny.xml", domain_xml(env)), env.tiny_config(cmdline="report=0")

    def hidden(*args):
        argv = ["unshare", "-m", "sh", "-c", script, "sh", env.vmcp_bin, "--store", env.store, *args]
        return vmcp_test.CommandResult(argv, subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False))

    if subprocess.run(["unshare", "-m", "sh", "-c", script, "sh", "true"], capture_output=True, check=False).returncode:
        raise Skip("the libraries cannot be hidden: not root, or elsewhere")
    for args, word in ((("run", xml), "libxml2"), (("run", "--connect", "test:///default", "test"), "libvirt")):
        result = hidden(*args)
        check_equal(result.status, 6, str(result))
        one_error(result, word)
    result = hidden("run", "--detach", cfg)
    check_equal(result.status, 0, str(result))
    env.vmcp("kill", "tiny")


# --- a real libvirtd

def test_missing_daemon(env):
    need("virsh")
    libvirt_host.enter()
    one_error(env.vmcp("run", "--connect", "qemu:///system", "web", status=6), "qemu:///system")


def define(env, name, text):
    virsh("define", env.write(f"{name}.xml", text))


def domain_console(env, name):
    path = ElementTree.fromstring(virsh("dumpxml", name)).find("devices/serial/source").get("path")
    out, into = os.open(path, os.O_RDONLY | os.O_NOCTTY), os.open(path, os.O_WRONLY | os.O_NOCTTY)
    console = GuestConsole(out, into, None, env.path("domain.log"))
    env.consoles.append(console)
    return Tiny(console)


def test_real_domains(env):
    """A domain of a real libvirtd with a network of its own, run by vmcp; a VM of vmcp, exported, run by QEMU below libvirt."""
    daemon = Daemon(env.dir)
    try:
        run("ip", "link", "add", "virbr7", "type", "bridge")
        virsh("net-define", env.write("net.xml", "<network><name>lan</name><forward mode='bridge'/><bridge name='virbr7'/></network>"))
        disk = env.image("disk.qcow2", "16M")
        card = "<interface type='network'><source network='lan'/><model type='virtio'/></interface>"
        define(env, "web", domain_xml(env, "web", disk_xml(disk), card, BUSY))
        before = virsh("dumpxml", "--inactive", "web")
        one_error(env.vmcp("run", "--connect", "nosuch:///system", "web", status=2), "nosuch")
        one_error(env.vmcp("run", "--connect", "qemu:///system", "nosuch", status=3), "nosuch")

        one_error(env.vmcp("run", "--connect", "qemu:///system", "web", status=4), "network lan")
        virsh("net-start", "lan")
        guest = env.spawn_tiny("run", "--connect", "qemu:///system", "web")
        check("lan" not in env.stderr_text(), env.stderr_text())
        bridge = os.listdir("/sys/class/net/virbr7/brif")
        check(any(name.startswith("vmcp") for name in bridge), f"no card of ours in libvirt's bridge: {bridge}")
        taken = env.vmcp_json("checkpoint", "--live", "web")
        guest.check()
        env.vmcp("revert", taken["id"])
        guest.check()
        env.vmcp("kill", "web")
        check_equal(virsh("dumpxml", "--inactive", "web"), before, "the domain's definition")
        check_equal(virsh("domstate", "web").strip(), "shut off", "the domain's state")

        # The other way: the same VM, on the disk that it has now, below libvirt.
        text = env.vmcp("config", "export", "--libvirt", "web").out
        run("virt-xml-validate", env.write("export.xml", text))
        # Emulated, as a software KVM is no processor to pass through.
        env.write("export.xml", text.replace("type='kvm'", "type='qemu'").replace("<cpu mode='host-passthrough'/>", ""))
        virsh("undefine", "web")
        virsh("define", env.path("export.xml"))
        virsh("start", "web", "--paused")
        guest = domain_console(env, "web")
        one_error(env.vmcp("run", "--connect", "qemu:///system", "web", status=4), "libvirt runs it")
        virsh("resume", "web")
        guest.ready()
        guest.check()
    finally:
        daemon.close()


def test_exports_are_valid(env):
    need("virt-xml-validate")
    disk = env.image("disk.qcow2", "16M")
    extra = "rng = yes\nballoon = yes\nvsock_cid = 5\ncpu_model = {}\n[net a]\nmode = user\nsend_rate = 10M\nreceive_rate = 2000\nqueues = 2\nforward = tcp:{}:1\n"
    port = 20000 + os.getpid() % 20000
    for model in ("host", "x86-64-v1"):
        config = env.tiny_config(cmdline="report=0 a=<&>'", disks=[("data", disk)], extra="")
        with open(config, encoding="utf-8") as file:
            text = file.read()
        env.write("tiny.cfg", text.replace("\n\n[disk", "\n" + extra.format(model, port) + "[disk"))
        guest = env.spawn_tiny("run", config)
        result = env.vmcp("config", "export", "--libvirt", "tiny")
        check("forwarded ports are not in the domain" in result.err and "queues are not in the domain" in result.err, str(result))
        run("virt-xml-validate", env.write("export.xml", result.out))
        again = env.vmcp("config", "convert", env.path("export.xml")).out
        for line in ("rng = yes", "balloon = yes", "vsock_cid = 5", "send_rate = 10486000", "mode = user"):
            check(line in again, f"{line}: {again}")
        env.vmcp("kill", "tiny")
        guest.console.close()


if __name__ == "__main__":
    vmcp_test.main(__name__)
