# bash completion for vmcp: asks `vmcp __complete`, which knows the commands, options, VMs, tags and ids.

_vmcp() {
	local line=${COMP_LINE:0:COMP_POINT} candidate full strip value
	local -a words files

	read -ra words <<<"$line"
	[[ $line == *[[:space:]] ]] && words+=("")
	full=${words[-1]}
	# bash takes a word apart at : and =, and replaces only the last part.
	strip=${full%"${full##*[:=]}"}
	value=$full
	[[ $full != --*=* ]] || value=${full#*=}
	COMPREPLY=()
	while IFS=$'\t' read -r candidate _; do
		case $candidate in
		:file | :dir)
			compopt -o filenames 2>/dev/null
			mapfile -t files < <(compgen "-${candidate:1:1}" -- "$value")
			COMPREPLY+=("${files[@]#"${value%"${value##*[:=]}"}"}")
			;;
		?*)
			case $candidate in *[:=]) compopt -o nospace 2>/dev/null ;; esac
			COMPREPLY+=("${candidate#"$strip"}")
			;;
		esac
	done < <("${words[0]}" __complete -- "${words[@]:1}" 2>/dev/null)
}
complete -F _vmcp vmcp
