#!/bin/bash
# agent_sh_test.sh AGENT: the shell variant of the guest's agent, with a folder for a root and a file for a host.
set -u
agent=$1
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export VMCP_ROOT=$dir/root PATH=$dir/bin:$PATH
mkdir -p "$VMCP_ROOT"/etc/ssh "$VMCP_ROOT"/etc/vmcp/hooks.d "$dir"/bin
failed=0
expect() { # WHAT GOT WANT
    [ "$2" = "$3" ] || { printf '%s: got "%s", want "%s"\n' "$1" "$2" "$3"; failed=1; }
}
# A key is its name and a number that is never the same.
cat >"$dir/bin/ssh-keygen" <<'KEYGEN'
#!/bin/sh
while [ $# -gt 0 ]; do [ "$1" = -f ] && file=$2; [ "$1" = -C ] && comment=$2; shift; done
[ ! -e "$FAIL_KEYS" ] || exit 1
echo "$file $$" >"$file"; echo "public $comment" >"$file.pub"
KEYGEN
chmod +x "$dir/bin/ssh-keygen"
export FAIL_KEYS=$dir/fail
say() { # UUID GENERATION: what a host says
    printf 'vmcp 1\nuuid %s\ngeneration %s\nname web-1\nhostname web-1\ncard 0000:00:04.0 52:56:00:00:00:01 10.0.0.5/24\ncard bad\ncard 0000:00:05.0 52:56:00:00:00:02 10.1.0.5/8\nnews from a newer host\ntime 1767225600.000000000\nseed %064d\nend\n' "$1" "$2" 7
}
one=11111111-2222-4333-8444-555555555555 two=99999999-2222-4333-8444-555555555555
life=00112233445566778899aabbccddeeff other=ff112233445566778899aabbccddeeff
: >"$VMCP_ROOT/etc/machine-id"
echo debian >"$VMCP_ROOT/etc/hostname"
printf '127.0.0.1\tlocalhost debian\n127.0.1.1 debian.example.org debian # debian\n# debian\n' >"$VMCP_ROOT/etc/hosts"
echo old >"$VMCP_ROOT/etc/ssh/ssh_host_rsa_key"
# shellcheck disable=SC2016 # for the hook
printf '#!/bin/sh\necho "$1 $VMCP_NAME $VMCP_OLD_UUID" >>"$VMCP_ROOT/hooks"; echo "$VMCP_CARDS" >"$VMCP_ROOT/cards"\n' >"$VMCP_ROOT/etc/vmcp/hooks.d/note"
chmod +x "$VMCP_ROOT/etc/vmcp/hooks.d/note"
cp "$VMCP_ROOT/etc/vmcp/hooks.d/note" "$VMCP_ROOT/etc/vmcp/hooks.d/note.dpkg-old"

expect "first" "$(say $one $life | sh "$agent" --serve)" $'agent 1\ndone first'
expect "host name of the first" "$(cat "$VMCP_ROOT/etc/hostname")" debian
expect "again" "$(say $one $life | sh "$agent" --serve)" $'agent 1\ndone same'
expect "another life" "$(say $one $other | sh "$agent" --serve)" $'agent 1\ndone life'
expect "keys of a life" "$(cat "$VMCP_ROOT/etc/ssh/ssh_host_rsa_key")" old
expect "clone" "$(say $two $life | sh "$agent" --serve)" $'agent 1\ndone clone'
expect "host name" "$(cat "$VMCP_ROOT/etc/hostname")" web-1
expect "hosts" "$(cat "$VMCP_ROOT/etc/hosts")" $'127.0.0.1\tlocalhost web-1\n127.0.1.1 web-1.example.org web-1 # web-1\n# debian'
expect "machine id" "$(cat "$VMCP_ROOT/etc/machine-id")" "${two//-/}"
expect "public key" "$(cat "$VMCP_ROOT/etc/ssh/ssh_host_rsa_key.pub")" "public root@web-1"
expect "keys that there were not" "$(ls "$VMCP_ROOT/etc/ssh")" $'ssh_host_rsa_key\nssh_host_rsa_key.pub'
expect "hooks" "$(cat "$VMCP_ROOT/hooks")" "first web-1 "$'\n'"life web-1 $one"$'\n'"clone web-1 $one"
expect "cards" "$(cat "$VMCP_ROOT/cards")" $'0000:00:04.0 52:56:00:00:00:01 10.0.0.5/24\n0000:00:05.0 52:56:00:00:00:02 10.1.0.5/8'
: >"$FAIL_KEYS"
expect "without keys" "$(say $one $life | sh "$agent" --serve | sed 's/ [^ ]*ssh_host/ ssh_host/')" \
    $'agent 1\nfailed ssh_host_rsa_key is the origin\'s\ndone clone'
expect "a bad uuid" "$(say '$(reboot)' $life | sh "$agent" --serve)" "agent 1"
expect "a bad greeting" "$(printf 'vmcp 2\nuuid %s\nname x\nend\n' $one | sh "$agent" --serve)" "agent 1"
[ $failed -eq 0 ] && echo "agent_sh_test: all as expected"
exit $failed
