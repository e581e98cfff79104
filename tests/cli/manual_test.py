#!/usr/bin/env python3
"""Help, manual pages, completions and documents against the tables of commands (`vmcp help --json`), so that none of them can drift. No KVM is needed.

Environment: VMCP_BIN; VMCP_BUILD: the build folder; VMCP_MAN: the folder of the manual pages of commands that the build made.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.join(HERE, "..", "..")
sys.path.insert(0, os.path.join(HERE, "..", "lib"))
import json_fields  # noqa: E402
import vmcp_test  # noqa: E402
from vmcp_test import Skip, check, check_equal  # noqa: E402

COMPLETIONS = os.path.join(ROOT, "cli", "completions")
# What users and scripts were promised: it may grow, and nothing of it may go.
PROMISED = {
    "run": "--name --detach --from", "ps": "", "console": "", "pause": "", "resume": "", "stop": "--timeout", "kill": "",
    "checkpoint": "--live --message --tag --wait", "revert": "", "log": "--graph", "show": "", "tag": "", "rm": "", "gc": "", "verify": "", "diff": "",
    "export": "", "import": "", "dump": "", "disk": "--format", "cancel": "", "stats": "", "doctor": "", "version": "", "help": "",
}
# And of their documents.
PROMISED_FIELDS = {
    "run": "vm, pid, socket, boot_ns",
    "checkpoint": "id, vm, parent, tag, message, created, live, durability, pause_ns, pause {quiesce_ns, state_ns, disks_ns, memory_ns, resume_ns}, "
                  "memory {total_pages, saved_pages, zero_pages, parent_pages, cow_faults, cow_fault_p50_ns, cow_fault_p99_ns, cow_fault_max_ns, written_bytes}, "
                  "disks [name, layer, inflight_writes, inflight_reads], durable_ns",
    "revert": "vm, checkpoint, mode, restored_pages, revert_ns",
    "log": "checkpoints [id, vm, parent, children, created, tag, message, size_bytes, durability], vms [name, state, at]",
    "ps": "vms [name, state, pid, memory_bytes, cpus, last_checkpoint]",
    "clone": "vms [name, pid, clone_ns, identity {}]",
    "verify": "checkpoints [id, ok, errors]",
}
EVERYWHERE = ["--json", "--store", "--store-key", "--quiet", "--verbose", "--help"]


def tables(env):
    document = env.vmcp_json("help")
    check(len(document["commands"]) > 20, "the tables are nearly empty")
    return document


def names(options):
    return ["--" + option["name"] for option in options]


def own_and_shared(document, command):
    return names(command["options"]) + names(document["everywhere"])


def test_promises(env):
    """Every command and option of the contract is there."""
    document = tables(env)
    known = {command["name"]: names(command["options"]) for command in document["commands"]}
    check_equal(names(document["everywhere"]), EVERYWHERE, "options of all commands")
    for name, options in PROMISED.items():
        check(name in known, f"there is no command {name}")
        check(set(options.split()) <= set(known[name]), f"{name}: {options} are not all of {known[name]}")
    for name in known:
        check_equal(env.vmcp_json("help", name)["name"], name, "help of one")
    told = {command["name"]: command["json"] for command in document["commands"]}
    for name, promise in PROMISED_FIELDS.items():
        check(is_within(json_fields.parse(promise)[0], json_fields.parse(told[name])[0]), f"{name}: {promise} is not all in {told[name]}")
    check_equal([name for name, fields in told.items() if not fields], ["console", "help"], "commands without a document of fields")


def is_within(promised, told):
    return all(name in told and not told[name][0] and (not below or (told[name][1] and is_within(below, told[name][1]) and told[name][2] == of_list))
               for name, (_, below, of_list) in promised.items())


def test_tables_hold_together(env):
    """The synopsis has the options of the table and no other; letters and names are unambiguous; each argument says what it may be."""
    document = tables(env)
    letters_of_all = [option["letter"] for option in document["everywhere"]]
    for command in document["commands"]:
        name = command["name"]
        shown = re.findall(r"(?<![\w-])--[a-z][a-z-]*", command["synopsis"])
        if name == "checkpoint":  # as people write it
            check("-m TEXT" in command["synopsis"], "checkpoint: -m is not in the synopsis")
            shown.append("--message")
        check_equal(sorted(set(shown)), sorted(names(command["options"])), f"{name}: options in the synopsis")
        letters = [letter for letter in letters_of_all + [option["letter"] for option in command["options"]] if letter]
        check_equal(len(letters), len(set(letters)), f"{name}: letters")
        everything = own_and_shared(document, command)
        check_equal(len(everything), len(set(everything)), f"{name}: options")
        check(len(command["summary"]) < 80 and not command["summary"].endswith("."), f"{name}: its summary: {command['summary']}")
        if command["max_arguments"]:
            check(command["words"], f"{name}: nothing says what its arguments may be")
        for option in command["options"]:
            check(option["help"] and not option["help"].endswith("."), f"{name}: --{option['name']}: {option['help']}")
            check(not option["words"] or option["argument"], f"{name}: --{option['name']} takes no value, but has words")
            if option["words"] and not option["words"].startswith("@"):
                for word in option["words"].split("|"):
                    check(word in option["help"] or word in option["argument"], f"{name}: --{option['name']}: {word} is not in its help")


def options_in(text):
    """Of the option lists of a help text."""
    return re.findall(r"^  (?:-\w,|   ) (--[a-z-]+)", text, re.M)


def test_help(env):
    """Text of `help CMD`, `CMD --help` and `help` has what the tables have."""
    document = tables(env)
    listed = env.vmcp("help").out
    for command in document["commands"]:
        text = env.vmcp("help", command["name"]).out
        check_equal(env.vmcp(command["name"], "--help").out, text, f"{command['name']} --help")
        check_equal(options_in(text), own_and_shared(document, command), f"options in the help of {command['name']}")
        for line in text.splitlines():
            check(len(line) <= 80 or line.startswith(" ") or line.startswith("vmcp"), f"{command['name']}: a line of {len(line)} columns: {line}")
        check(re.search(rf"^  {command['name']} +\S", listed, re.M), f"{command['name']} is not in `vmcp help`")
        check(command["group"] in listed, f"group {command['group']} is not in `vmcp help`")
    check("__" not in listed, "a hidden command is in `vmcp help`")


def rendered(path, *options):
    done = subprocess.run(["groff", "-man", "-ww", "-Tascii", "-P-c", "-P-b", "-P-u", "-rHY=0", *options, path], capture_output=True, check=False)
    check(done.returncode == 0 and not done.stderr, f"{path}: groff: {done.stderr.decode()}")
    return done.stdout.decode()


def man_folder():
    folder = os.environ.get("VMCP_MAN")
    check(folder and os.path.isdir(folder), "VMCP_MAN names no folder")
    return folder


def test_man(env):
    """A page for each command and one of all, which roff takes without a word, and whose options are the table's."""
    if not shutil.which("groff"):
        raise Skip("groff is not installed: nothing can read the manual pages")
    document = tables(env)
    pages = sorted(os.listdir(man_folder()))
    check_equal(pages, sorted(["vmcp.1"] + [f"vmcp-{command['name']}.1" for command in document["commands"]]), "pages")
    overview = rendered(os.path.join(man_folder(), "vmcp.1"))
    for command in document["commands"]:
        path = os.path.join(man_folder(), f"vmcp-{command['name']}.1")
        with open(path, encoding="utf-8") as file:
            source = file.read().replace("\\-", "-")
        check_equal(re.findall(r"^\.TP\n(?:\\fB-\w\\fR, )?\\fB(--[a-z-]+)\\fR", source, re.M), own_and_shared(document, command), f"options in {path}")
        text = rendered(path)
        flat = " ".join(text.split())
        for option in command["options"]:
            check(option["help"].split()[-1] in flat, f"{path}: what --{option['name']} does is not there")
        for line in (command["help"] or "").splitlines():
            if line.startswith(" "):
                check(" ".join(line.split()).replace("`", "") in flat, f"{path}: '{line}' is not there")
        for fields in (command["json"] or "").split("|"):
            check(" ".join(fields.split()) in flat, f"{path}: the fields {fields} are not there")
        for heading in ("NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "SEE ALSO"):
            check(f"\n{heading}" in text, f"{path}: no {heading}")
        check(f"vmcp-{command['name']}(1)" in overview, f"{command['name']} is not in vmcp(1)")


def test_pages_of_documents(env):
    """The pages that are made of docs/: roff takes them, and what stands in the documents' tables and blocks is there."""
    if not shutil.which("groff"):
        raise Skip("groff is not installed: nothing can read the manual pages")
    build = os.path.join(os.environ["VMCP_BUILD"], "docs")
    for page, document in (("man5/guest.cfg.5", "guest-cfg.md"), ("man5/vmcp-store.5", "format.md"), ("man5/vmcp-formats.5", "format.md"),
                           ("man7/vmcp-tutorial.7", "tutorial.md"), ("man7/vmcp-operations.7", "operations.md")):
        text = rendered(os.path.join(build, page), "-rLL=200n")
        check("NAME" in text and "SEE ALSO" in text and len(text) > 1000, page)
        with open(os.path.join(ROOT, "docs", document), encoding="utf-8") as file:
            source = file.read()
        if document == "format.md":
            continue
        for words in re.findall(r"^\| `([\w.-]+)` \|", source, re.M) + re.findall(r"^    (\S.*)$", source, re.M):
            check(" ".join(words.split()) in " ".join(text.split()), f"{page}: '{words}' is not there")
    sources = []
    for page in ("vmcp-store.5", "vmcp-formats.5"):
        with open(os.path.join(build, "man5", page), encoding="utf-8") as file:
            sources += re.findall(r"^\.SH (.*)$", file.read(), re.M)
    with open(os.path.join(ROOT, "docs", "format.md"), encoding="utf-8") as file:
        check_equal(len(set(sources) - {"NAME", "DESCRIPTION", "SEE ALSO"}), len(re.findall(r"^## (?!How this is tested)", file.read(), re.M)), "chapters of format.md in the two pages")


def vmcp_lines(text):
    """What documents tell people to type: `vmcp ...` in indented lines and between backquotes."""
    for line in re.findall(r"^ {2,}(?:\$ |# )?(.*\bvmcp .*)$", text, re.M) + re.findall(r"`(vmcp [^`]*)`", text):
        line = re.sub(r"\s#\s.*$| {2,}.*$", "", line)
        for part in re.split(r"&&|\|(?!pipe)|;|\$\(", line):
            words = re.sub(r"\s>\s*\S+", "", part).replace("`", "").replace(")", "").strip().split()
            while words and words[0] in ("ssh", "sudo", "other", "HOST", "if", "time"):
                words.pop(0)
            if words and words[0] == "vmcp" and "..." not in part and "[" not in part and not re.fullmatch(r"vmcp [a-z ]+ \d+", " ".join(words)):
                yield re.sub(r"\s>\s*\S+", "", part).strip()


def check_line(document, line, where):
    known = {command["name"]: command for command in document["commands"]}
    try:
        words = shlex.split(line.replace("...", ""))
    except ValueError as error:
        raise vmcp_test.Failed(f"{where}: {line}: {error}") from error
    words = words[words.index("vmcp") + 1:]
    command, values = None, []
    shared = {"--" + option["name"]: option for option in document["everywhere"]}
    shared.update({"-" + option["letter"]: option for option in document["everywhere"] if option["letter"]})
    options = dict(shared)
    takes = False
    for word in words:
        if takes:
            takes = False
        elif word.startswith("-") and word != "-":
            name = word.strip("[]").split("=")[0]
            check(name in options, f"{where}: `{line}`: {'vmcp' if command is None else command['name']} has no option {name}")
            takes = bool(options[name]["argument"]) and "=" not in word
        elif command is None:
            if not re.fullmatch(r"[a-z]+", word):
                return
            check(word in known, f"{where}: `{line}`: there is no command {word}")
            command = known[word]
            options.update({"--" + option["name"]: option for option in command["options"]})
            options.update({"-" + option["letter"]: option for option in command["options"] if option["letter"]})
        else:
            values.append(word)
    if command:
        check(len(values) <= command["max_arguments"], f"{where}: `{line}`: {len(values)} arguments, {command['max_arguments']} are possible")


def test_documents(env):
    """What help texts and documents tell people to type is there: commands, options, numbers of arguments."""
    document = tables(env)
    seen = 0
    texts = [(f"help {command['name']}", command["help"] or "") for command in document["commands"]]
    for folder in ("", "docs"):
        for name in sorted(os.listdir(os.path.join(ROOT, folder))):
            if name.endswith(".md"):
                with open(os.path.join(ROOT, folder, name), encoding="utf-8") as file:
                    texts.append((name, file.read()))
    for where, text in texts:
        for line in vmcp_lines(text):
            check_line(document, line, where)
            seen += 1
    check(seen > 60, f"only {seen} command lines were found")
    for wrong in ("vmcp nosuch", "vmcp run --nosuch guest.cfg", "vmcp ps a b"):
        try:
            check_line(document, wrong, "here")
        except vmcp_test.Failed:
            continue
        raise vmcp_test.Failed(f"{wrong}: this test takes it")


# --- what goes wrong


def wrong(env, status, *words):
    """Two lines on stderr, the document on stdout, and the status that the class of the error has."""
    plain, told = env.vmcp(*words, status=status), env.vmcp("--json", *words, status=status)
    lines = plain.err.splitlines()
    check(len(lines) == 2 and lines[0].startswith("vmcp: ") and lines[1].startswith("hint: "), f"not an error and a hint: {plain}")
    error = told.json["error"]
    check_equal(sorted(error), ["code", "hint", "message"], "fields of an error")
    check_equal((f"vmcp: {error['message']}", f"hint: {error['hint']}"), tuple(lines), "the document against the lines")
    check_equal(error["code"], {2: "usage", 3: "not-found", 4: "state", 5: "damaged", 6: "host"}[status], "code")
    return lines[1]


def test_exit_statuses(env):
    """Each status, by what needs no KVM."""
    golden_store(env)
    env.vmcp("show", "first")
    wrong(env, 2, "show")
    wrong(env, 2, "checkpoint", "--max-rate", "fast", "tiny")
    wrong(env, 3, "show", "nosuch")
    wrong(env, 3, "run", env.path("nosuch.cfg"))
    wrong(env, 4, "checkpoint", "tiny")
    env.write("damaged.vmcp", "x" * 4096)
    check_equal(env.vmcp("import", "--check", env.path("damaged.vmcp"), status=None).status, 5, "a file that is none of ours")
    layer = os.path.join(env.store, "layers", sorted(name for name in os.listdir(os.path.join(env.store, "layers")) if name.endswith(".mem"))[0])
    with open(layer, "r+b") as file:
        file.write(b"\xff" * 4096)
    check_equal(env.vmcp("verify", status=None).status, 5, "verify of a damaged layer")


def test_did_you_mean(env):
    """Of commands, options, words, VMs, tags and disks the nearest one is named."""
    golden_store(env)
    for status, words, meant in ((2, ["chekpoint"], "`vmcp checkpoint`"), (2, ["sp"], "`vmcp ps`"), (2, ["help", "rveert"], "`vmcp revert`"),
                                 (2, ["log", "--grpah"], "--graph"), (2, ["ps", "--jsno"], "--json"), (2, ["config", "inti"], "`vmcp config init`"),
                                 (2, ["disk", "chekc", "x"], "`vmcp disk check`"), (3, ["stats", "tniy"], "'tiny'"), (3, ["show", "brnach"], "'branch'"),
                                 (3, ["show", "tniy~1"], "'tiny~1'"), (3, ["revert", "Frist"], "'first'"), (3, ["tag", "--delete", "brench"], "'branch'"),
                                 (3, ["disk", "info", "first:dtaa"], "first:data"), (3, ["disk", "info", "tiny:dat"], "tiny:data"),
                                 (3, ["show", "tiny~99"], "tiny~")):
        check(meant in wrong(env, status, *words), f"{words}: {meant} is not in the hint")
    for words in (["frobnicate"], ["log", "--frobnicate"], ["stats", "frobnicate"], ["show", "frobnicate"], ["disk", "info", "first:frobnicate"]):
        hint = wrong(env, 3 if words[0] in ("stats", "show", "disk") else 2, *words)
        check("did you mean" not in hint, f"{words}: {hint}")


def test_options_of_verbs(env):
    """An option that is for another verb of its command is refused, not passed over."""
    for words in (["config", "init", "-", "--connect", "test:///default"], ["config", "convert", "a.xml", "--memory", "1G"], ["config", "export", "tiny", "--force"],
                  ["disk", "info", "x", "--repair"], ["disk", "export", "a", "b", "--second-opinion"]):
        wrong(env, 2, *words)


# --- completion


def golden_store(env):
    with tarfile.open(os.path.join(HERE, "..", "golden", "store-1.tar.xz")) as archive:
        archive.extractall(env.dir)


def candidates(env, *words):
    lines = env.vmcp("__complete", "--", *words).out.splitlines()
    return [line.split("\t")[0] for line in lines]


def test_completion(env):
    """Commands, options and words are the tables'; names come from the store."""
    golden_store(env)
    document = tables(env)
    check_equal(candidates(env, ""), [command["name"] for command in document["commands"]], "commands")
    check_equal(candidates(env, "--store", env.store, "re"), ["resume", "revert", "rekey"], "commands that begin with re")
    for command in document["commands"]:
        check_equal(candidates(env, command["name"], "--"), own_and_shared(document, command), f"options of {command['name']}")
        for option in command["options"]:
            words = (option["words"] or "").split("|")
            if option["words"] and not option["words"].startswith("@"):
                check_equal(candidates(env, command["name"], "--" + option["name"], ""), words, f"{command['name']} --{option['name']}")
                check_equal(candidates(env, command["name"], f"--{option['name']}={words[0][:2]}"), [f"--{option['name']}={words[0]}"], option["name"])
            elif option["argument"] and not option["words"]:
                check_equal(candidates(env, command["name"], "--" + option["name"], ""), [], f"{command['name']} --{option['name']}")
    check_equal(candidates(env, "show", "")[:2], ["branch", "3b66b3dbeef1"], "checkpoints, newest first")
    check_equal(candidates(env, "show", "9a"), ["9a1a3d58b5f8"], "an id")
    check_equal(candidates(env, "diff", "first", "bra"), ["branch"], "the second of two")
    check_equal(candidates(env, "diff", "first", "branch", ""), [], "behind the last argument")
    check_equal(candidates(env, "log", ""), ["tiny"], "VMs")
    check_equal(candidates(env, "stop", ""), [], "VMs that run")
    check_equal(candidates(env, "tag", "first", ""), [], "a new name")
    check_equal(candidates(env, "run", ""), [":file"], "a file")
    check_equal(candidates(env, "export", "first", ""), [":file"], "a file")
    check_equal(candidates(env, "--store", ""), [":dir"], "a folder")
    check_equal(candidates(env, "nosuch", ""), [], "behind a command that is none")
    check(":file" in candidates(env, "disk", "info", "") and "first:" in candidates(env, "disk", "info", ""), "sources")
    check_equal(candidates(env, "disk", "info", "first:"), [":file", "first:data"], "disks of a checkpoint, or files")
    check_equal(env.vmcp("__complete", "--", "--store", env.path("none"), "show", "").out, "", "a store that is not there")


def with_path(env):
    return dict(os.environ, PATH=os.path.dirname(env.vmcp_bin) + ":" + os.environ["PATH"], VMCP_STORE=env.store, HOME=env.dir)


def in_shell(env, program, script):
    if not shutil.which(program):
        raise Skip(f"{program} is not installed")
    done = subprocess.run([program, *(["-f"] if program == "zsh" else []), "-c", script], stdin=subprocess.DEVNULL, capture_output=True, timeout=60,
                          env=with_path(env), cwd=env.dir, check=False)
    check(done.returncode == 0 and not done.stderr, f"{program}: exit {done.returncode}: {done.stderr.decode()}{done.stdout.decode()}")
    return done.stdout.decode().splitlines()


def bash(env, line):
    return in_shell(env, "bash", f"source {COMPLETIONS}/vmcp.bash; COMP_LINE={shlex.quote(line)}; COMP_POINT=${{#COMP_LINE}}; _vmcp; "
                    '[ ${#COMPREPLY[@]} -eq 0 ] || printf "%s\\n" "${COMPREPLY[@]}"')


def test_bash(env):
    golden_store(env)
    env.write("machine.cfg", "")
    check_equal(bash(env, "vmcp re"), ["resume", "revert", "rekey"], "commands")
    check_equal(bash(env, "vmcp revert fi"), ["first"], "tags")
    check_equal(bash(env, "vmcp revert 9a1"), ["9a1a3d58b5f8"], "ids")
    check_equal(bash(env, "vmcp checkpoint --wait="), ["captured", "written", "durable"], "words behind =")
    check_equal(bash(env, "vmcp run mach"), ["machine.cfg"], "files")
    check_equal(bash(env, "vmcp disk info first:"), ["data"], "disks")
    check_equal(bash(env, "vmcp stop "), [], "nothing")


def test_fish(env):
    golden_store(env)

    def fish(line):
        return [one.split("\t")[0] for one in in_shell(env, "fish", f"source {COMPLETIONS}/vmcp.fish; complete -C {shlex.quote(line)}")]

    check_equal(fish("vmcp re"), ["rekey", "resume", "revert"], "commands")
    check_equal(fish("vmcp revert fi"), ["first"], "tags")
    check_equal(fish("vmcp checkpoint --wait wr"), ["written"], "words")


ZSH = r"""
zmodload zsh/zpty; zpty z zsh -f -i
zpty -w z "PS1= ; autoload -U compinit; compinit -u -D; source $1; zstyle ':completion:*' list-prompt ''; bindkey -e; bindkey '^I' complete-word; stty cols 200; print rea''dy"
zpty -r -m z line '*ready*'
zpty -n -w z "$2"$'\t'$'\C-aprint -r -- "<'$'\C-e>"\n'
zpty -r -m z line $'*\n<*>*'
print -r -- "$line"
"""


def test_zsh(env):
    golden_store(env)
    if not shutil.which("zsh"):
        raise Skip("zsh is not installed")

    def zsh(line):
        done = subprocess.run(["zsh", "-f", "-c", ZSH, "zsh", f"{COMPLETIONS}/_vmcp", line], stdin=subprocess.DEVNULL, capture_output=True, timeout=60,
                              env=with_path(env), cwd=env.dir, check=False)
        found = re.findall(r"^<(.*)>\r*$", done.stdout.decode(), re.M)
        check(found, f"zsh: {done.stdout.decode()!r} {done.stderr.decode()}")
        return found[-1].strip()

    check_equal(zsh("vmcp revert fi"), "vmcp revert first", "tags")
    check_equal(zsh("vmcp checkpoint --inst"), "vmcp checkpoint --instant", "options")
    check_equal(zsh("vmcp bal"), "vmcp balloon", "commands")


if __name__ == "__main__":
    vmcp_test.main(__name__)
