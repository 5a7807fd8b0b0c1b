package ocicli

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"strconv"
	"strings"

	"conex/internal/plainjson"
	"conex/internal/runtime"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// list is a flag that may be given several times.
type list []string

func (l *list) String() string     { return strings.Join(*l, ",") }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

// execOptions are the flags of exec.
type execOptions struct {
	consoleSocket, pidFile, process, cwd, user, apparmor, cgroup string
	env, gids, caps                                              list
	tty, detach, noNewPrivs, ignorePaused                        bool
	preserve                                                     int
}

func execCommand(fs *flag.FlagSet) func(*app, []string) error {
	var o execOptions
	fs.StringVar(&o.consoleSocket, "console-socket", "", "")
	fs.StringVar(&o.pidFile, "pid-file", "", "")
	fs.StringVar(&o.cwd, "cwd", "", "")
	fs.StringVar(&o.apparmor, "apparmor", "", "")
	fs.StringVar(&o.cgroup, "cgroup", "", "")
	fs.String("process-label", "", "")
	fs.BoolVar(&o.noNewPrivs, "no-new-privs", false, "")
	fs.BoolVar(&o.ignorePaused, "ignore-paused", false, "")
	fs.Bool("no-subreaper", false, "")
	fs.IntVar(&o.preserve, "preserve-fds", 0, "")
	for _, n := range []string{"process", "p"} {
		fs.StringVar(&o.process, n, "", "")
	}
	for _, n := range []string{"user", "u"} {
		fs.StringVar(&o.user, n, "", "")
	}
	for _, n := range []string{"env", "e"} {
		fs.Var(&o.env, n, "")
	}
	for _, n := range []string{"additional-gids", "g"} {
		fs.Var(&o.gids, n, "")
	}
	for _, n := range []string{"cap", "c"} {
		fs.Var(&o.caps, n, "")
	}
	for _, n := range []string{"tty", "t"} {
		fs.BoolVar(&o.tty, n, false, "")
	}
	for _, n := range []string{"detach", "d"} {
		fs.BoolVar(&o.detach, n, false, "")
	}
	return func(a *app, args []string) error {
		if label := fs.Lookup("process-label").Value.String(); label != "" {
			return errors.New("--process-label: SELinux labels are not supported")
		}
		if o.cgroup != "" {
			return errors.New("--cgroup: processes in a cgroup below the container's are not supported")
		}
		return a.exec(args[0], args[1:], &o)
	}
}

func (a *app) exec(id string, args []string, o *execOptions) error {
	c, err := a.open(id)
	if err != nil {
		return err
	}
	switch status := c.status(); {
	case status == specs.StateStopped:
		return errors.New("cannot exec in a stopped container")
	case status == specs.StateCreating:
		return errors.New("cannot exec in a container that is being created")
	case status == "paused" && !o.ignorePaused:
		return errors.New("cannot exec in a paused container (use --ignore-paused to override)")
	}
	p, err := c.execProcess(args, o)
	if err != nil {
		return err
	}
	switch {
	case p.Terminal && o.detach && o.consoleSocket == "":
		return errNoConsole
	case !p.Terminal && o.consoleSocket != "":
		return errors.New("--console-socket: the process has no terminal")
	}
	a.allow(p)
	preserve, err := preserved(o.preserve, p)
	if err != nil {
		return err
	}
	cfg, err := c.runtimeConfig()
	if err != nil {
		return err
	}
	box, err := runtime.Open(cfg, c.rec.Pid)
	if errors.Is(err, os.ErrProcessDone) {
		return errors.New("cannot exec in a stopped container")
	}
	if err != nil {
		return err
	}
	proc, err := box.Exec(context.Background(), &runtime.ExecConfig{
		Process: p, Stdio: [3]*os.File{os.Stdin, os.Stdout, os.Stderr}, Exact: true, PreserveFDs: preserve,
	})
	if err != nil {
		return err
	}
	front, err := (&startOptions{consoleSocket: o.consoleSocket, pidFile: o.pidFile, detach: o.detach}).foreground(proc)
	if err != nil {
		return errors.Join(err, proc.Signal(9))
	}
	if o.detach {
		return nil
	}
	st, err := front.wait(proc)
	if err != nil {
		return err
	}
	return code(st.Code)
}

// execProcess is what --process says, or the container's own process with what the other flags change.
func (c *container) execProcess(args []string, o *execOptions) (*specs.Process, error) {
	if o.process != "" {
		f, err := os.ReadFile(o.process)
		if err != nil {
			return nil, err
		}
		var p specs.Process
		if err := plainjson.Unmarshal(f, &p); err != nil {
			return nil, fmt.Errorf("%s: %w", o.process, err)
		}
		if len(p.Args) == 0 {
			return nil, fmt.Errorf("%s: args must not be empty", o.process)
		}
		return &p, nil
	}
	if len(args) == 0 {
		return nil, errors.New("exec: no command given, and no --process")
	}
	spec, err := c.config()
	if err != nil {
		return nil, err
	}
	p := *spec.Process
	p.Args, p.Terminal, p.ConsoleSize = args, o.tty, nil
	if o.cwd != "" {
		p.Cwd = o.cwd
	}
	if o.apparmor != "" {
		p.ApparmorProfile = o.apparmor
	}
	p.NoNewPrivileges = p.NoNewPrivileges || o.noNewPrivs
	p.Env = append(append([]string{}, p.Env...), o.env...)
	if len(o.caps) > 0 {
		var set specs.LinuxCapabilities
		if p.Capabilities != nil {
			set = *p.Capabilities
		}
		for _, have := range []*[]string{&set.Bounding, &set.Effective, &set.Permitted} {
			*have = append(append([]string{}, *have...), o.caps...)
		}
		p.Capabilities = &set
	}
	if o.user != "" {
		user, group, hasGroup := strings.Cut(o.user, ":")
		if p.User.UID, err = parseID("--user", user); err != nil {
			return nil, err
		}
		if hasGroup {
			if p.User.GID, err = parseID("--user", group); err != nil {
				return nil, err
			}
		}
	}
	for _, g := range o.gids {
		id, err := parseID("--additional-gids", g)
		if err != nil {
			return nil, err
		}
		p.User.AdditionalGids = append(append([]uint32{}, p.User.AdditionalGids...), id)
	}
	return &p, nil
}

func parseID(flag, s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 31)
	if err != nil {
		return 0, fmt.Errorf("%s: %q is not a number", flag, s)
	}
	return uint32(n), nil
}
