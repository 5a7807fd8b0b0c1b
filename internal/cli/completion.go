package cli

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"conex/internal/engine"
	"conex/internal/linux/caps"
)

func (a *app) completionCommand() *cobra.Command {
	shells := []string{"bash", "zsh", "fish", "powershell"}
	return &cobra.Command{
		Use: "completion SHELL", Short: "Print what makes a shell complete commands, flags and names",
		Long: fmt.Sprintf(`SHELL is bash, zsh, fish or powershell. For this one shell:

  bash   source <(%[1]s completion bash)    (wants the package bash-completion)
  zsh    source <(%[1]s completion zsh)
  fish   %[1]s completion fish | source

For all: write it to /usr/share/bash-completion/completions/%[1]s, to _%[1]s in
a folder of zsh's $fpath, or to /etc/fish/completions/%[1]s.fish. 'make install'
did that.`, a.name),
		Args: a.exactly(1), ValidArgs: shells,
		RunE: func(cmd *cobra.Command, args []string) error {
			root := cmd.Root()
			switch args[0] {
			case "bash":
				return root.GenBashCompletionV2(a.out, true)
			case "zsh":
				return root.GenZshCompletion(a.out)
			case "fish":
				return root.GenFishCompletion(a.out, true)
			case "powershell":
				return root.GenPowerShellCompletionWithDesc(a.out)
			}
			return a.usageError(cmd, fmt.Errorf("%q is none of %s", args[0], strings.Join(shells, ", ")))
		},
	}
}

// completing says that a shell asks what a command line may go on with, and not for the command itself.
func completing(args []string) bool {
	return len(args) > 0 && (args[0] == cobra.ShellCompRequestCmd || args[0] == cobra.ShellCompNoDescRequestCmd)
}

// words are what may stand at a place of the command line, each with a tab and its description where it has one.
type words func(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective)

const (
	noFiles = cobra.ShellCompDirectiveNoFileComp
	files   = cobra.ShellCompDirectiveDefault
	// unfinished is for what is no whole word yet, as "name=".
	unfinished = cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
)

// complete adds to a tree of commands what only a completion needs: the words of arguments and of flags' values.
func (a *app) complete(cmd *cobra.Command) {
	for _, c := range cmd.Commands() {
		a.complete(c)
	}
	if cmd.HasSubCommands() && cmd.Annotations["runs"] == "" {
		return
	}
	path := commandName(cmd)
	if cmd.ValidArgs == nil {
		cmd.ValidArgsFunction = a.argumentWords(path)
	}
	cmd.LocalFlags().VisitAll(func(f *pflag.Flag) {
		if w := a.flagWords(path, f); w != nil {
			_ = cmd.RegisterFlagCompletionFunc(f.Name, w) // it fails for flags that are not the command's, or have one
		}
	})
}

// commandName is a command as Docker's short form has it: "ps" for "conex container ls", "volume rm" for "conex volume rm".
func commandName(cmd *cobra.Command) string {
	_, path, _ := strings.Cut(cmd.CommandPath(), " ")
	group, name, ok := strings.Cut(path, " ")
	if !ok {
		return path
	}
	if strings.HasPrefix(group, "build") && name == "build" {
		return name
	}
	for _, c := range commands() {
		if g, n := groupOf(c.name); g == group && n == name {
			return c.name
		}
	}
	return path
}

func (a *app) argumentWords(path string) words {
	running := a.containers("running")
	switch path {
	case "run", "create":
		return upTo(1, a.images)
	case "attach", "port", "top":
		return upTo(1, running)
	case "exec":
		return upTo(1, a.containers("running", "paused"))
	case "logs", "diff", "export", "rename", "update":
		return upTo(1, a.containers())
	case "commit":
		return upTo(1, a.containers(), a.images)
	case "debug":
		return upTo(1, a.containers(), a.images)
	case "start":
		return each(a.containers("created", "exited"))
	case "stop", "kill", "stats":
		return each(running)
	case "pause":
		return each(running)
	case "unpause":
		return each(a.containers("paused"))
	case "rm", "restart", "wait", "why", "container inspect":
		return each(a.containers())
	case "inspect":
		return each(a.containers(), a.images, a.volumes, a.networks)
	case "cp":
		return a.copyWords
	case "rmi", "save", "image inspect", "image mount", "image unmount":
		return each(a.images)
	case "push", "history", "images", "image layers", "image explore", "image tree":
		return upTo(1, a.images)
	case "tag", "image diff":
		return upTo(2, a.images)
	case "volume rm", "volume inspect", "volume du":
		return each(a.volumes)
	case "volume clone", "volume export", "volume import", "volume rename", "volume restore", "volume snapshot", "volume snapshots":
		return upTo(1, a.volumes)
	case "network rm", "network inspect":
		return each(a.networks)
	case "network connect", "network disconnect":
		return func(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
			if len(args) == 0 {
				return a.networks(cmd, args, prefix)
			}
			return upTo(2, a.containers())(cmd, args, prefix)
		}
	case "build", "import", "load", "image load", "runtime":
		return nil // files
	}
	return cobra.NoFileCompletions
}

// upTo completes only the first n arguments, each those that the line has not yet.
func upTo(n int, of ...words) words {
	w := each(of...)
	return func(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
		if len(args) >= n {
			return nil, noFiles
		}
		return w(cmd, args, prefix)
	}
}

func each(of ...words) words {
	return func(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
		var all []string
		for _, w := range of {
			more, _ := w(cmd, args, prefix)
			all = append(all, more...)
		}
		return slices.DeleteFunc(all, func(w string) bool { return slices.Contains(args, w) }), noFiles
	}
}

// oneOf completes with what is written here. Words that end in = or : are not the whole value.
func oneOf(list ...string) words {
	return func(_ *cobra.Command, _ []string, prefix string) ([]string, cobra.ShellCompDirective) {
		var fit []string
		d := noFiles
		for _, w := range list {
			if strings.HasPrefix(w, prefix) {
				fit = append(fit, w)
				if strings.HasSuffix(w, "=") || strings.HasSuffix(w, ":") || strings.HasSuffix(w, ",") {
					d = unfinished
				}
			}
		}
		return fit, d
	}
}

// containers completes with the names of the containers in one of the states, of all without one. What can't be listed, without root
// above all, completes with nothing: a shell has no place for an error.
func (a *app) containers(states ...string) words {
	return func(cmd *cobra.Command, _ []string, prefix string) ([]string, cobra.ShellCompDirective) {
		req := engine.ListRequest{All: true}
		if len(states) > 0 {
			req.Filters = map[string][]string{"status": states}
		}
		e, err := a.engine()
		if err != nil {
			return nil, noFiles
		}
		var names []string
		list, _ := e.ListContainers(cmd.Context(), req) // an error beside the list is about one of them
		for i := range list {
			names = append(names, strings.TrimPrefix(list[i].Names[0], "/"))
		}
		return starting(prefix, names), noFiles
	}
}

func (a *app) images(cmd *cobra.Command, _ []string, prefix string) ([]string, cobra.ShellCompDirective) {
	e, err := a.engine()
	if err != nil {
		return nil, noFiles
	}
	var names []string
	list, _ := e.ListImages(cmd.Context(), engine.ImagesRequest{}) // an error beside the list is about one of them
	for i := range list {
		for _, t := range list[i].RepoTags {
			if strings.HasPrefix(t, "<none>") {
				continue
			}
			if r, ok := strings.CutSuffix(t, ":latest"); ok && !strings.Contains(prefix, ":") {
				t = r
			}
			names = append(names, t)
		}
	}
	return starting(prefix, names), noFiles
}

func (a *app) volumes(cmd *cobra.Command, _ []string, prefix string) ([]string, cobra.ShellCompDirective) {
	e, err := a.engine()
	if err != nil {
		return nil, noFiles
	}
	var names []string
	list, _ := e.ListVolumes(cmd.Context(), nil) // without one there is nothing to complete with
	for i := range list {
		names = append(names, list[i].Name)
	}
	return starting(prefix, names), noFiles
}

func (a *app) networks(cmd *cobra.Command, _ []string, prefix string) ([]string, cobra.ShellCompDirective) {
	e, err := a.engine()
	if err != nil {
		return nil, noFiles
	}
	var names []string
	list, _ := e.ListNetworks(cmd.Context(), nil) // without one there is nothing to complete with
	for i := range list {
		names = append(names, list[i].Name)
	}
	return starting(prefix, names), noFiles
}

func starting(prefix string, names []string) []string {
	names = slices.DeleteFunc(names, func(n string) bool { return !strings.HasPrefix(n, prefix) })
	slices.Sort(names)
	return slices.Compact(names)
}

// copyWords are containers with the colon that their paths stand behind; what looks like a path is one.
func (a *app) copyWords(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	if len(args) >= 2 || strings.ContainsAny(prefix, "/.:") {
		return nil, files
	}
	names, _ := a.containers()(cmd, nil, prefix)
	for i := range names {
		names[i] += ":"
	}
	return names, cobra.ShellCompDirectiveNoSpace
}

// flagWords are the values that a flag may have, nil for files and for flags without a value.
func (a *app) flagWords(path string, f *pflag.Flag) words {
	if f.NoOptDefVal != "" || f.Hidden {
		return nil
	}
	namespace := func(modes ...string) words {
		return func(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
			if of, ok := strings.CutPrefix(prefix, "container:"); ok {
				names, _ := a.containers("running")(cmd, nil, of)
				for i := range names {
					names[i] = "container:" + names[i]
				}
				return names, noFiles
			}
			return oneOf(append(modes, "container:")...)(cmd, args, prefix)
		}
	}
	switch f.Name {
	case "cidfile", "config", "device", "env-file", "file", "from-file", "iidfile", "input", "label-file", "metadata-file", "output", "root", "secret", "state", "trace", "volume":
		return nil
	case "network":
		if path == "build" {
			return oneOf("default", "host", "none")
		}
		modes := namespace("host", "none")
		return func(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
			list, d := modes(cmd, args, prefix)
			more, _ := a.networks(cmd, args, prefix)
			return append(more, slices.DeleteFunc(list, func(w string) bool { return slices.Contains(more, w) })...), d
		}
	case "pid", "uts":
		return namespace("host")
	case "ipc":
		return namespace("host", "none", "private", "shareable")
	case "cgroupns":
		return oneOf("host", "private")
	case "userns":
		return oneOf("auto", "auto:size=", "host", "nomap")
	case "volumes-from":
		return each(a.containers())
	case "link":
		return func(cmd *cobra.Command, _ []string, prefix string) ([]string, cobra.ShellCompDirective) {
			names, _ := a.containers("running")(cmd, nil, prefix)
			for i := range names {
				names[i] += ":"
			}
			return names, unfinished
		}
	case "image":
		return a.images
	case "pull":
		return oneOf("always", "missing", "never")
	case "restart":
		return oneOf("always", "no", "on-failure", "on-failure:", "unless-stopped")
	case "signal", "stop-signal":
		return oneOf("SIGALRM", "SIGCONT", "SIGHUP", "SIGINT", "SIGKILL", "SIGQUIT", "SIGSTOP", "SIGTERM", "SIGTSTP", "SIGUSR1", "SIGUSR2", "SIGWINCH")
	case "cap-add", "cap-drop":
		list := append([]string{"ALL"}, caps.All()...)
		for i := range list {
			list[i] = strings.TrimPrefix(list[i], "CAP_")
		}
		return oneOf(list...)
	case "security-opt":
		return oneOf("apparmor=unconfined", "label=disable", "no-new-privileges", "seccomp=", "seccomp=unconfined", "systempaths=unconfined")
	case "log-driver":
		return oneOf("journald", "json-file", "local", "none", "syslog")
	case "log-opt":
		return oneOf("compress=", "env=", "env-regex=", "labels=", "labels-regex=", "max-buffer-size=", "max-file=", "max-size=", "mode=blocking", "mode=non-blocking",
			"syslog-address=", "syslog-facility=", "syslog-format=", "tag=")
	case "runtime":
		return oneOf("conex", "crun", "runc")
	case "health-on-failure":
		return oneOf("kill", "none", "restart", "stop")
	case "condition":
		return oneOf("healthy", "next-exit", "not-running", "removed")
	case "gpus":
		return oneOf("all", "count=", "device=")
	case "isolation":
		return oneOf("default")
	case "ulimit":
		return oneOf("as=", "core=", "cpu=", "data=", "fsize=", "locks=", "memlock=", "msgqueue=", "nice=", "nofile=", "nproc=", "rss=", "rtprio=", "rttime=", "sigpending=", "stack=")
	case "mount":
		return oneOf("type=bind,", "type=image,", "type=tmpfs,", "type=volume,")
	case "platform":
		return oneOf("linux/386", "linux/amd64", "linux/arm/v6", "linux/arm/v7", "linux/arm64", "linux/ppc64le", "linux/riscv64", "linux/s390x")
	case "env":
		return func(_ *cobra.Command, _ []string, prefix string) ([]string, cobra.ShellCompDirective) {
			var names []string
			for _, v := range os.Environ() {
				n, _, _ := strings.Cut(v, "=")
				names = append(names, n)
			}
			return starting(prefix, names), unfinished
		}
	case "type":
		return oneOf("container", "image", "network", "volume")
	case "format":
		return oneOf("json", "table")
	case "progress":
		return oneOf("auto", "json", "plain", "quiet", "tty")
	case "compression":
		return oneOf("gzip", "none", "zstd")
	case "driver":
		if strings.HasPrefix(path, "network") {
			return oneOf("bridge", "ipvlan", "macvlan")
		}
		return oneOf("local")
	case "storage-driver":
		return oneOf("dir", "erofs")
	case "filter":
		return oneOf(filterKeys(path)...)
	}
	return cobra.NoFileCompletions
}

// filterKeys are the filters of a command that has some, with the values where these are few.
func filterKeys(path string) []string {
	switch path {
	case "ps":
		return []string{"ancestor=", "before=", "exited=", "expose=", "health=healthy", "health=none", "health=starting", "health=unhealthy", "id=", "is-task=", "label=", "name=",
			"network=", "publish=", "since=", "status=created", "status=dead", "status=exited", "status=paused", "status=removing", "status=restarting", "status=running", "volume="}
	case "images":
		return []string{"before=", "dangling=false", "dangling=true", "label=", "reference=", "since=", "until="}
	case "events":
		return []string{"container=", "daemon=", "event=", "image=", "label=", "network=", "scope=", "type=container", "type=image", "type=network", "type=volume", "volume="}
	case "image prune":
		return []string{"dangling=false", "dangling=true", "label!=", "label=", "until="}
	case "container prune", "network prune", "system prune":
		return []string{"label!=", "label=", "until="}
	case "network ls":
		return []string{"dangling=false", "dangling=true", "driver=", "id=", "label=", "name=", "scope=", "type=builtin", "type=custom"}
	case "volume ls":
		return []string{"dangling=false", "dangling=true", "driver=", "label=", "name="}
	case "volume prune":
		return []string{"all=", "label!=", "label="}
	case "search":
		return []string{"is-official=false", "is-official=true", "stars="}
	}
	return nil
}
