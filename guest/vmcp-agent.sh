#!/bin/sh
# vmcp-agent.sh - vmcp-agent for a guest that takes no foreign program: sh, perl and coreutils or busybox
#
#   vmcp-agent.sh            reaches the host by vsock, applies what it says, and does so again in each life
#   vmcp-agent.sh --serve    the same once, for a connection on stdin and stdout
#
# perl (in Debian: perl-base, always there) opens the connection, and reseeds the kernel's random numbers: writing to /dev/urandom alone does not. What
# it does otherwise is in docs/agent.md. VMCP_ROOT, for tests: a folder whose files are changed, and nothing of the running kernel.

root=${VMCP_ROOT-}
noted_folder=$root/var/lib/vmcp-agent
noted_life=$root/run/vmcp-agent.generation

matches() { # TEXT PATTERN: is all of it that?
    printf '%s\n' "$1" | grep -Eqx -- "$2"
}

failures=''
fail() {
    failures="${failures:+$failures; }$1"
}

replace() { # FILE: by stdin, as a whole
    cat >"$1.vmcp-new" && chmod 644 "$1.vmcp-new" && mv -f "$1.vmcp-new" "$1"
}

apply_seed() {
    [ -n "$seed" ] || return 0
    # RNDADDENTROPY and RNDRESEEDCRNG of linux/random.h.
    if [ -z "$root" ]; then
        # By a pipe: arguments are everybody's to read.
        printf '%s' "$seed" | perl -e '$s = pack("H*", <STDIN>); open(F, ">", "/dev/urandom") or die; ioctl(F, 0x40085203, pack("ii", 8 * length $s, length $s) . $s) or die;
            ioctl(F, 0x5207, 0) or die' || fail "random seed"
    fi
}

apply_time() {
    { [ -n "$time" ] && [ -z "$root" ]; } || return 0
    off=$((${time%.*} - $(date +%s)))
    if [ "${off#-}" -gt 1 ]; then
        date -s "@${time%.*}" >/dev/null || fail "clock"
    fi
}

apply_machine_id() {
    for file in "$root/etc/machine-id" "$root/var/lib/dbus/machine-id"; do
        if [ -f "$file" ] && [ ! -L "$file" ]; then
            printf '%s\n' "$uuid" | tr -d - | replace "$file" || fail "$file"
        fi
    done
}

set_card() { # INTERFACE MAC ADDRESS/LENGTH
    if [ "$(cat "/sys/class/net/$1/address")" = "$2" ] && ip -4 addr show dev "$1" | grep -q " $3 "; then
        return 0
    fi
    # Routes by gateways go with the old address.
    routes=$(ip -4 route show dev "$1" | sed -n -e '/ via /!d' -e 's/ src [^ ]*//' -e 's/ dev [^ ]*//' -e 's/ linkdown//' -e p)
    ip -4 addr flush dev "$1" && ip addr add "$3" broadcast + dev "$1" && ip link set dev "$1" up || return 1
    # With arp_notify the kernel tells the network of the address and the card's own.
    notify=/proc/sys/net/ipv4/conf/$1/arp_notify before=$(cat "/proc/sys/net/ipv4/conf/$1/arp_notify")
    echo 1 >"$notify"
    ip link set dev "$1" address "$2" || fail "$1: address of the card"
    echo "$before" >"$notify"
    while read -r route; do
        # shellcheck disable=SC2086 # its words
        [ -z "$route" ] || ip route replace $route dev "$1" || fail "$1: the route $route is gone"
    done <<ROUTES
$routes
ROUTES
}

apply_cards() {
    [ -z "$root" ] || return 0
    while IFS=' ' read -r pci mac address; do
        [ -n "$pci" ] || continue
        for interface in /sys/bus/pci/devices/"$pci"/virtio*/net/*; do
            { [ -e "$interface" ] && set_card "${interface##*/}" "$mac" "$address"; } || fail "card $pci: address $address"
        done
    done <<CARDS
$cards
CARDS
}

apply_hostname() {
    [ -n "$hostname" ] || return 0
    old=$(cat "$root/etc/hostname" 2>/dev/null)
    [ -n "$root" ] || echo "$hostname" >/proc/sys/kernel/hostname || fail "host name"
    echo "$hostname" | replace "$root/etc/hostname" || fail "/etc/hostname"
    if [ -f "$root/etc/hosts" ] && matches "$old" '[A-Za-z0-9-]+'; then
        sed -e '/^[[:space:]]*#/b' -e "s/\([[:space:]]\)$old\([[:space:].]\)/\1$hostname\2/g" -e "s/\([[:space:]]\)$old\$/\1$hostname/" "$root/etc/hosts" |
            replace "$root/etc/hosts" || fail "/etc/hosts"
    fi
}

apply_ssh_keys() {
    changed=''
    for type in ed25519 ecdsa rsa; do
        key=$root/etc/ssh/ssh_host_${type}_key
        [ -f "$key" ] || continue
        rm -f "$key.vmcp-new" "$key.vmcp-new.pub"
        if ssh-keygen -q -N '' -C "root@${hostname:-$name}" -t "$type" -f "$key.vmcp-new" </dev/null >/dev/null; then
            mv -f "$key.vmcp-new.pub" "$key.pub" && mv -f "$key.vmcp-new" "$key" && changed=yes
        else
            fail "$key is the origin's"
        fi
    done
    if [ -n "$changed" ] && [ -z "$root" ] && pid=$(cat /run/sshd.pid 2>/dev/null) && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = sshd ]; then
        kill -HUP "$pid"
    fi
}

run_hooks() { # EVENT OLD_UUID
    for hook in "$root"/etc/vmcp/hooks.d/*; do
        if [ -x "$hook" ] && matches "${hook##*/}" '[A-Za-z0-9_-]+'; then
            VMCP_EVENT=$1 VMCP_OLD_UUID=$2 VMCP_UUID=$uuid VMCP_NAME=$name VMCP_HOSTNAME=$hostname VMCP_GENERATION=$generation VMCP_CARDS=$cards \
                "$hook" "$1" </dev/null >/dev/null || fail "$hook: exit status $?"
        fi
    done
}

apply() {
    failures=''
    old_uuid=$(cat "$noted_folder/uuid" 2>/dev/null)
    if [ -z "$old_uuid" ]; then
        event=first
    elif [ "$old_uuid" != "$uuid" ]; then
        event=clone
    elif [ -n "$generation" ] && [ "$(cat "$noted_life" 2>/dev/null)" = "$generation" ]; then
        event=same
    else
        event=life
    fi
    if [ $event != same ]; then
        apply_seed
        apply_time
        apply_cards
        if [ $event = clone ]; then
            apply_machine_id
            apply_hostname
            apply_ssh_keys
        fi
        run_hooks $event "$old_uuid"
        { mkdir -p "$noted_folder" && echo "$uuid" | replace "$noted_folder/uuid"; } || fail "$noted_folder"
        mkdir -p "${noted_life%/*}" && echo "$generation" >"$noted_life"
    fi
    [ -z "$failures" ] || printf 'failed %.400s\n' "$(printf %s "$failures" | tr -c ' -~' '?')"
    echo "done $event"
}

serve() {
    echo "agent 1"
    uuid='' generation='' name='' hostname='' cards='' time='' seed=''
    while IFS=' ' read -r key value; do
        case $key in
            vmcp) [ "$value" = 1 ] || exit 1 ;;
            uuid) matches "$value" '[0-9a-f-]{36}' && uuid=$value ;;
            generation) matches "$value" '[0-9a-f]{32}' && generation=$value ;;
            name) matches "$value" '[A-Za-z0-9][A-Za-z0-9._-]{0,62}' && name=$value ;;
            hostname) matches "$value" '[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?' && hostname=$value ;;
            card)
                matches "$value" '[0-9a-f:.]{12} ([0-9a-f]{2}:){5}[0-9a-f]{2} ([0-9]{1,3}\.){3}[0-9]{1,3}/[0-9]{1,2}' && cards="${cards:+$cards
}$value"
                ;;
            time) matches "$value" '[0-9]{1,12}\.[0-9]{9}' && time=$value ;;
            seed) matches "$value" '[0-9a-f]{32,128}' && seed=$value ;;
            end)
                { [ -n "$uuid" ] && [ -n "$name" ]; } || exit 1
                apply
                hostname='' cards='' time='' seed=''
                ;;
        esac
    done
}

case ${1-} in
    --serve) serve ;;
    '')
        while :; do
            # AF_VSOCK is 40; port 7349 of the host, CID 2.
            perl -e 'socket(S, 40, 1, 0) && connect(S, pack("SSLLx4", 40, 0, 7349, 2)) or exit 1; open(STDIN, "<&", S); open(STDOUT, ">&", S); exec @ARGV' \
                sh "$0" --serve && continue
            sleep 2
        done
        ;;
    *) sed -n '2,/^$/{/^#/!d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2 ;;
esac
