#!/bin/bash
# build.sh - make a small, real Debian 12 guest from Debian's packages
#
#   examples/debian-guest/build.sh [--fresh] [--systemd] [--cmdline WORDS] [--with PACKAGES] [--prepare SCRIPT] OUTDIR
#
# Makes in OUTDIR:
#   vmlinuz      the kernel of Debian's package linux-image-cloud-amd64, untouched
#   initrd.img   the initramfs that Debian's initramfs-tools made for it
#   root.qcow2   ext4 root file system on a whole disk (no partitions), 2 GiB, about 280 MB used
#   guest.cfg    a configuration for `vmcp run OUTDIR/guest.cfg`
#
# Nothing is mounted on a loop device: mmdebstrap unpacks the packages into a folder, mke2fs -d makes the
# file system from it, qemu-img the qcow2. Needs root (packages own files as several users) and the
# packages of `scripts/setup.sh demo`. The host's own Debian mirror is used, else deb.debian.org;
# VMCP_DEBIAN_MIRROR names another one.
#
# The result is kept in ${VMCP_CACHE:-~/.cache/vmcp} under a hash of this script, SCRIPT and the packages, so that only the
# first run builds; later ones copy, which needs neither root nor network. If OUTDIR already has the files of this recipe nothing
# is done; --fresh puts a pristine root.qcow2 in place of one that a VM has written to.
# --systemd makes a Debian as people know it: systemd, a card with DHCP on vmcp's user network, and sshd, which port 2222 of the host's loopback leads to:
# `ssh -p 2222 root@localhost`. Root has no password there, and all users of the host come to that port. Boots slower.
# --cmdline adds WORDS to the kernel's command line in guest.cfg. "norandmaps" is a good one where the guest runs
# on an emulated processor (tests/with-kvm): its processes find QEMU's translated code again.
# --with puts more of Debian's packages into the guest, for example --with fio,postgresql. Their services are not started at boot.
# --prepare runs SCRIPT (a file) by the guest's /bin/sh in its root, as root, after all packages: to set up by a fast processor what a guest needs.
# VMCP_GUEST_KERNEL=linux-image-amd64 takes Debian's general kernel instead (packed with xz, larger; has VMGenID and 9p).
#
# In the guest: root's shell on ttyS0, no login, started anew when it ends; on the console the line
# "vmcp-guest ready" comes before the first prompt. `poweroff`, `reboot`, both with and without -f, and the
# ACPI power button work. Aboard: bash, coreutils, procps, e2fsprogs, stress-ng, apt, acpid.
# Kernel command line options of the guest's own:
#   vmcp.run=PATH    run PATH at boot, before the first prompt; its status is printed as "vmcp-run: exit N"
#
# Exit status: 0 done; 1 it failed; 2 wrong usage.

set -euo pipefail

readonly SUITE=bookworm
readonly KERNEL=${VMCP_GUEST_KERNEL:-linux-image-cloud-amd64}
# busybox is the guest's init: every process it need not start counts in a nested machine.
readonly BASIC=$KERNEL,initramfs-tools,busybox,kmod,mount,acpid,procps,e2fsprogs,stress-ng
# With --systemd, in place of busybox as init.
readonly SYSTEMD=systemd-sysv,udev,dbus,openssh-server
readonly DISK_SIZE=2G

say() { printf 'debian-guest: %s\n' "$*" >&2; }
die() { printf 'debian-guest: %s\n' "$1" >&2; [ $# -lt 2 ] || printf 'hint: %s\n' "$2" >&2; exit 1; }
show_help() { sed -n '2,/^$/{/^#/!d;s/^# \{0,1\}//;p}' "$0"; }

# --- the files that make a guest of a plain Debian -----------------------------------------------

# Before the packages: how initramfs-tools is to make its image.
configure_initramfs() {
    local root=$1
    mkdir -p "$root/etc/initramfs-tools/conf.d" "$root/usr/share/initramfs-tools/modules.d"
    # A list instead of "most", and hardly any compression: unpacking is dear in an emulated guest.
    printf '%s\n' MODULES=list BUSYBOX=n COMPRESS=zstd COMPRESSLEVEL=1 FSTYPE=ext4 RESUME=none \
        >"$root/etc/initramfs-tools/conf.d/vmcp"
    printf '%s\n' virtio_pci virtio_blk ext4 >"$root/usr/share/initramfs-tools/modules.d/vmcp"
}

# After the packages.
configure_guest() {
    local root=$1
    echo debian >"$root/etc/hostname"
    printf '127.0.0.1\tlocalhost debian\n' >"$root/etc/hosts"
    cat >"$root/etc/fstab" <<'FSTAB'
/dev/vda /        ext4  errors=remount-ro        0 1
tmpfs    /tmp     tmpfs mode=1777,nosuid,nodev   0 0
tmpfs    /dev/shm tmpfs mode=1777,nosuid,nodev,X-mount.mkdir 0 0
FSTAB
    : >"$root/etc/machine-id"
    # Escape sequences around a paste only confuse who drives the shell by a program.
    echo 'set enable-bracketed-paste off' >>"$root/etc/inputrc"
    mkdir -p "$root/etc/acpi/events"
    printf 'event=button/power.*\naction=/sbin/poweroff\n' >"$root/etc/acpi/events/vmcp-power"
    "configure_$init" "$root"
    rm -rf "$root"/etc/apt/apt.conf.d/99mmdebstrap "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* \
        "$root"/var/log/*
}

configure_systemd() {
    local root=$1
    mkdir -p "$root/etc/systemd/system/serial-getty@ttyS0.service.d"
    # A shell on the console without a login.
    # shellcheck disable=SC2016 # agetty's own variable
    printf '%s\n' '[Service]' 'ExecStart=' 'ExecStart=-/sbin/agetty --autologin root --keep-baud 115200 %I $TERM' \
        >"$root/etc/systemd/system/serial-getty@ttyS0.service.d/vmcp-guest.conf"
    # shellcheck disable=SC2016 # for the guest's shell
    echo '[ -e /run/vmcp-guest.ready ] || [ "$(tty)" != /dev/ttyS0 ] || { : >/run/vmcp-guest.ready; echo "vmcp-guest ready"; }' \
        >"$root/etc/profile.d/vmcp-guest.sh"
    printf '%s\n' '[Match]' 'Name=en* eth*' '[Network]' DHCP=ipv4 >"$root/etc/systemd/network/lan.network"
    printf '%s\n' 'PermitRootLogin yes' 'PermitEmptyPasswords yes' 'UseDNS no' >"$root/etc/ssh/sshd_config.d/vmcp-guest.conf"
    chroot "$root" passwd --quiet --delete root
    chroot "$root" systemctl --quiet enable systemd-networkd ssh
}

configure_busybox() {
    local root=$1 lib=$1/usr/local/lib/vmcp-guest tool
    mkdir -p "$lib"
    for tool in init poweroff reboot halt; do
        ln -sf /bin/busybox "$root/sbin/$tool"
    done
    cat >"$root/etc/inittab" <<'INITTAB'
::sysinit:/usr/local/lib/vmcp-guest/boot
ttyS0::respawn:/usr/local/lib/vmcp-guest/shell
::shutdown:/usr/local/lib/vmcp-guest/shutdown
::ctrlaltdel:/sbin/reboot
INITTAB

    cat >"$lib/boot" <<'BOOT'
#!/bin/sh
# Runs once, as init's first child. The initramfs hands over /proc, /sys, /dev, /dev/pts and /run
# mounted. As few programs as possible: starting one takes 30 ms in a nested machine.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
read -r hostname </etc/hostname
echo "$hostname" >/proc/sys/kernel/hostname
mount -a
busybox ip link set lo up
# Drivers of whatever devices there are: what udev would do, once and without a daemon. Aliases of
# the processor are left out: kvm and the ciphers took 2 s of 8 in an emulated guest.
find /sys/devices -name modalias -exec cat {} + | grep -v '^cpu:' | sort -u | xargs -r modprobe -abq evdev
acpid >/dev/null 2>&1
read -r cmdline </proc/cmdline
for word in $cmdline; do
    case $word in
        vmcp.run=*)
            "${word#vmcp.run=}" </dev/null
            echo "vmcp-run: exit $?"
            ;;
    esac
done
BOOT

    cat >"$lib/shell" <<'SHELL'
#!/bin/sh
# init gives us ttyS0 as a controlling terminal.
cd /root || cd /
if [ ! -e /run/vmcp-guest.ready ]; then
    : >/run/vmcp-guest.ready
    echo 'vmcp-guest ready'
fi
exec env -i HOME=/root TERM=vt220 LANG=C.UTF-8 USER=root LOGNAME=root SHELL=/bin/bash \
    PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin /bin/bash -i
SHELL

    cat >"$lib/shutdown" <<'SHUTDOWN'
#!/bin/sh
# init has told all processes to end; what is left is the root file system.
sync
mount -o remount,ro / 2>/dev/null
SHUTDOWN
    chmod 755 "$lib"/*
}

print_guest_cfg() {
    # quiet silences the initramfs; loglevel=5 brings the kernel's warnings back to the console.
    cat <<'CFG'
# A small Debian 12, made by examples/debian-guest/build.sh
[vm]
name = debian
memory = 512M
cpus = 1
kernel = vmlinuz
initrd = initrd.img
cmdline = console=ttyS0 root=/dev/vda rootfstype=ext4 rw quiet loglevel=5 fsck.mode=skip
rng = yes

[disk root]
path = root.qcow2
CFG
    [ "$init" = busybox ] || printf '\n[net lan]\nmode = user\nforward = tcp:2222:22\n'
}

# --- building ------------------------------------------------------------------------------------

# Prints sources for the guest's suite: the host's own where it has them, so that a local mirror is used.
print_sources() {
    local key='[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]' lines=''
    if [ -n "${VMCP_DEBIAN_MIRROR:-}" ]; then
        lines="deb $key $VMCP_DEBIAN_MIRROR $SUITE main"
    elif command -v apt-get >/dev/null; then
        # ORIGIN comes from the signed release file: third parties that use the same suite names drop out.
        # shellcheck disable=SC2016 # apt's own variables
        lines=$(apt-get indextargets --format '$(ORIGIN) $(REPO_URI) $(RELEASE) $(COMPONENT)' \
            'Created-By: Packages' 2>/dev/null |
            awk -v key="$key" -v suite="$SUITE" '
                $1 == "Debian" && $4 == "main" && $3 ~ "^" suite "(-updates|-security)?$" && !seen[$2 $3]++ {
                    print "deb", key, $2, $3, $4 }')
    fi
    if [ -z "$lines" ]; then
        lines="deb $key http://deb.debian.org/debian $SUITE main
deb $key http://deb.debian.org/debian-security $SUITE-security main"
    fi
    printf '%s\n' "$lines"
}

# Makes the files in folder $1, with the packages cached in folder $2.
build() {
    local out=$1 debs=$2 work=$1/work root=$1/work/root start=$SECONDS version
    local tool
    [ "$(id -u)" -eq 0 ] || die "building the guest needs root" "run: sudo $0 ..."
    for tool in mmdebstrap mke2fs qemu-img; do
        command -v "$tool" >/dev/null || die "$tool is missing" "run: scripts/setup.sh demo"
    done
    mkdir -p "$work" "$debs"
    print_sources >"$work/sources.list"
    # How the host reaches its mirror (proxies, expired snapshots) holds for the guest's packages too.
    apt-config dump 2>/dev/null | grep -E '^Acquire::(http|https|ftp|Check-Valid|Check-Date|Retries|Max-)' \
        >"$work/apt.conf" || true
    # mmdebstrap runs hooks with the new root as their argument and a clean environment. The cached packages
    # are linked, not copied, where they are on the same file system.
    {
        declare -f configure_initramfs
        cat <<HOOK
set -eu
configure_initramfs "\$1"
mkdir -p "\$1/var/cache/apt/archives"
for deb in '$debs'/*.deb; do
    [ ! -e "\$deb" ] || cp -l "\$deb" "\$1/var/cache/apt/archives/" 2>/dev/null || cp "\$deb" "\$1/var/cache/apt/archives/"
done
HOOK
    } | sed '1i #!/bin/bash' >"$work/setup-hook"
    # shellcheck disable=SC2016 # the hook's own $1
    printf '#!/bin/sh\nset -e\ncp -n "$1"/var/cache/apt/archives/*.deb %q/\n' "$debs" >"$work/customize-hook"
    if [ -n "$prepare" ]; then
        # shellcheck disable=SC2016
        printf 'chroot "$1" /bin/sh -s <%q\n' "$(realpath "$prepare")" >>"$work/customize-hook"
    fi
    chmod +x "$work"/*-hook

    say "unpacking and configuring Debian $SUITE with $KERNEL"
    # Downloaded packages are kept for the next build: that is what the skipped cleanups are for.
    if ! mmdebstrap --quiet --variant=apt --include="$packages" \
        --aptopt="$work/apt.conf" \
        --dpkgopt=force-unsafe-io \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/info/*' \
        --skip=essential/unlink --skip=cleanup/apt \
        --setup-hook="$work/setup-hook" --customize-hook="$work/customize-hook" \
        "$SUITE" "$root" "$work/sources.list" >"$work/log" 2>&1; then
        tail -n 5 "$work/log" >&2
        cp "$work/log" "$debs/build.log"
        die "mmdebstrap failed" "its whole output is in $debs/build.log"
    fi
    configure_guest "$root"

    say "making the disk image"
    version=$(find "$root/boot" -name 'vmlinuz-*' -printf '%f\n' | sed 's/^vmlinuz-//')
    cp "$root/boot/vmlinuz-$version" "$out/vmlinuz"
    cp "$root/boot/initrd.img-$version" "$out/initrd.img"
    # The guest needs no copy of what it was booted from.
    rm -f "$root"/boot/initrd.img-* "$root"/boot/vmlinuz-*
    rm -f "$work/root.raw"
    mke2fs -q -t ext4 -L debian-root -E lazy_itable_init=0,lazy_journal_init=0,nodiscard \
        -d "$root" "$work/root.raw" "$DISK_SIZE" >/dev/null
    qemu-img convert -f raw -O qcow2 "$work/root.raw" "$out/root.qcow2"
    print_guest_cfg >"$out/guest.cfg"
    rm -rf "$work"
    say "built in $((SECONDS - start)) s"
}

# --- main ----------------------------------------------------------------------------------------

fresh='' cmdline='' packages=$BASIC prepare='' init=busybox
while [ $# -gt 0 ]; do
    case $1 in
        --fresh) fresh=1; shift ;;
        --systemd) init=systemd packages+=,$SYSTEMD; shift ;;
        --cmdline)
            [ $# -ge 2 ] || { printf 'debian-guest: --cmdline needs a value\n' >&2; exit 2; }
            cmdline=$2
            shift 2
            ;;
        --with)
            [ $# -ge 2 ] || { printf 'debian-guest: --with needs a value\n' >&2; exit 2; }
            [[ $2 =~ ^[a-z0-9][a-z0-9.+-]*(,[a-z0-9][a-z0-9.+-]*)*$ ]] || {
                printf "debian-guest: --with: '%s' is no list of package names\nhint: names with commas between, as in fio,postgresql\n" "$2" >&2
                exit 2
            }
            packages+=,$2
            shift 2
            ;;
        --prepare)
            [ $# -ge 2 ] || { printf 'debian-guest: --prepare needs a value\n' >&2; exit 2; }
            [ -f "$2" ] || { printf "debian-guest: --prepare: there is no file '%s'\n" "$2" >&2; exit 2; }
            prepare=$2
            shift 2
            ;;
        --help | -h) show_help; exit 0 ;;
        -*) printf 'debian-guest: unknown option %s\n' "$1" >&2; exit 2 ;;
        *) break ;;
    esac
done
if [ $# -ne 1 ]; then
    printf 'debian-guest: one argument is needed: the folder to build in\nhint: %s --help\n' "$0" >&2
    exit 2
fi
outdir=$1
recipe=$({ cat "${BASH_SOURCE[0]}" ${prepare:+"$prepare"}; printf '%s' "$packages $init"; } | sha256sum | cut -c 1-16)
cache=${VMCP_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/vmcp}
made=$cache/debian-guest-$recipe

complete() {
    local file
    for file in vmlinuz initrd.img root.qcow2 guest.cfg; do
        [ -s "$1/$file" ] || return 1
    done
}

if [ -z "$fresh" ] && complete "$outdir" && [ "$(cat "$outdir/.recipe" 2>/dev/null)" = "$recipe $cmdline" ]; then
    say "$outdir is up to date"
    exit 0
fi
if ! complete "$made"; then
    mkdir -p "$cache"
    exec {lock_fd}>"$cache/debian-guest.lock"
    flock "$lock_fd"
    if ! complete "$made"; then
        building=$(mktemp -d "$cache/debian-guest-building.XXXXXX")
        trap 'rm -rf "$building"' EXIT
        build "$building" "$cache/debs"
        chmod 755 "$building"
        # Older recipes' results are of no use to anyone any more; both kernel flavours may stay.
        find "$cache" -maxdepth 1 -type d -name 'debian-guest-????????????????' -mmin +60 -exec rm -rf {} +
        rm -rf "$made"
        mv "$building" "$made"
        trap - EXIT
    fi
    exec {lock_fd}>&-
fi
mkdir -p "$outdir"
rm -f "$outdir/.recipe"
# --reflink shares the blocks where the file system can; the copy is still one that a VM may write to.
for file in vmlinuz initrd.img root.qcow2 guest.cfg; do
    cp --reflink=auto --sparse=auto "$made/$file" "$outdir/$file.new"
    mv "$outdir/$file.new" "$outdir/$file"
done
if [ -n "$cmdline" ]; then
    while IFS= read -r line; do
        [[ $line != 'cmdline = '* ]] || line+=" $cmdline"
        printf '%s\n' "$line"
    done <"$made/guest.cfg" >"$outdir/guest.cfg"
fi
printf '%s %s\n' "$recipe" "$cmdline" >"$outdir/.recipe"
say "$outdir is ready"
