# fish completion for vmcp: asks `vmcp __complete`, which knows the commands, options, VMs, tags and ids.

function __vmcp_complete
    set -l words (commandline -opc)
    set -l last (commandline -ct)
    for line in ($words[1] __complete -- $words[2..-1] "$last" 2>/dev/null)
        switch $line
            case ':file'
                __fish_complete_path "$last"
            case ':dir'
                __fish_complete_directories "$last"
            case '*'
                echo $line
        end
    end
end
complete -c vmcp -f -a '(__vmcp_complete)'
