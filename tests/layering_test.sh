#!/bin/sh
# layering_test.sh ROOT: includes go down only (the table of layers in docs/architecture.md).
#
# For each folder the headers of other folders that it may include, as shell patterns. A folder's own headers are
# always allowed, another folder's *_internal.h never. Tests beside the code may also include tests/lib.
set -u
cd "$1" || exit 1
# Patterns like base/* are for the case statements below, not for files.
set -f

allowed() {
	case $1 in
	base) echo "" ;;
	vmm | cowdisk | net) echo "base/*" ;;
	devices) echo "base/* vmm/vm.h vmm/bus.h vmm/memory.h vmm/acpi.h cowdisk/block.h net/*" ;;
	checkpoint) echo "base/* vmm/* cowdisk/block.h cowdisk/overlay.h cowdisk/check.h cowdisk/map.h cowdisk/merge.h" ;;
	machine) echo "base/* vmm/* cowdisk/* net/* devices/* checkpoint/*" ;;
	guest) echo "base/*" ;;
	control) echo "base/* machine/* checkpoint/* guest/protocol.h" ;;
	libvmcp) echo "base/* control/client.h checkpoint/store/store.h" ;;
	cli) echo "base/* control/* checkpoint/store/* cowdisk/block.h cowdisk/check.h cowdisk/compare.h cowdisk/info.h cowdisk/merge.h" ;;
	esac
}

matches() {
	text=$1
	shift
	for pattern in "$@"; do
		# shellcheck disable=SC2254 # it is a pattern
		case $text in
		$pattern) return 0 ;;
		esac
	done
	return 1
}

files=0
checked=0
failed=0
complain() {
	echo "layering: $*" >&2
	failed=$((failed + 1))
}

check_file() {
	folder=$1
	file=$2
	patterns=$(allowed "$folder")
	for target in $(sed -nE 's/^[[:space:]]*#[[:space:]]*include[[:space:]]*"([^"]+)".*/\1/p' "$file"); do
		checked=$((checked + 1))
		case $target in
		"$folder"/*) continue ;;
		*_internal.h) complain "$file includes $target, which is internal to another folder" ;;
		*/*) ;;
		*) complain "$file includes \"$target\": write the path from the root of the repository" ;;
		esac
		case $file:$target in
		*_test.c:tests/lib/*) continue ;;
		esac
		# shellcheck disable=SC2086 # a list of patterns
		matches "$target" $patterns || complain "$file includes $target: $folder/ may not"
	done
}

for folder in base vmm cowdisk net devices checkpoint machine guest control cli libvmcp; do
	[ -d "$folder" ] || continue
	for file in $(find "$folder" -name '*.[ch]' -o -name '*.def' | sort); do
		files=$((files + 1))
		check_file "$folder" "$file"
	done
done

# check_system HEADER MOST PLACE...: <HEADER> is included by at most MOST files, all at the PLACEs.
check_system() {
	header=$1
	most=$2
	shift 2
	users=$(grep -rlE "^[[:space:]]*#[[:space:]]*include[[:space:]]*<$header" base vmm cowdisk net devices \
		checkpoint machine control cli libvmcp --include='*.[ch]' --exclude='*_test.c' --exclude=host.c 2>/dev/null)
	count=0
	for file in $users; do
		count=$((count + 1))
		matches "$file" "$@" || complain "$file includes <$header>, which only $* may"
	done
	[ "$count" -le "$most" ] || complain "$count files include <$header>, $most may"
}
check_system 'linux/kvm\.h' 99 'vmm/*'
check_system 'linux/userfaultfd\.h' 2 'checkpoint/*'
check_system 'libqcow' 2 'cowdisk/*'
check_system 'libvirt' 1 'machine/*'

echo "layering: $checked includes in $files files checked, $failed wrong"
[ "$checked" -gt 0 ] && [ "$files" -gt 0 ] && [ "$failed" -eq 0 ]
