package cli

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/docker/go-units"
	apic "github.com/moby/moby/api/types/container"
	"github.com/spf13/pflag"

	"conex/internal/container"
)

// processFlags are about the first process: what it is, its streams, how it is stopped.
type processFlags struct {
	interactive, tty, init                bool
	entrypoint, stopSignal, user, workdir string
	stopTimeout                           optInt
	env                                   envFlag
	envFile, attach, groupAdd             list
	ulimits                               ulimitFlag
	umask                                 umaskFlag
}

func (c *processFlags) register(f *pflag.FlagSet) {
	f.VarP(&c.attach, "attach", "a", "Attach to STDIN, STDOUT or STDERR")
	f.StringVar(&c.entrypoint, "entrypoint", "", "Overwrite the default ENTRYPOINT of the image")
	f.VarP(&c.env, "env", "e", "Set environment variables")
	f.Var(&c.envFile, "env-file", "Read in a file of environment variables")
	f.Var(&c.groupAdd, "group-add", "Add additional groups to join")
	f.BoolVar(&c.init, "init", false, "Run an init inside the container that forwards signals and reaps processes")
	f.BoolVarP(&c.interactive, "interactive", "i", false, "Keep STDIN open even if not attached")
	f.StringVar(&c.stopSignal, "stop-signal", "", "Signal to stop the container")
	f.Var(&c.stopTimeout, "stop-timeout", "Timeout (in seconds) to stop a container")
	f.BoolVarP(&c.tty, "tty", "t", false, "Allocate a pseudo-TTY")
	f.Var(&c.ulimits, "ulimit", "Ulimit options")
	f.Var(&c.umask, "umask", "Set umask for the container")
	f.StringVarP(&c.user, "user", "u", "", "Username or UID (format: <name|uid>[:<group|gid>])")
	f.StringVarP(&c.workdir, "workdir", "w", "", "Working directory inside the container")
}

func (c *processFlags) apply(t *flagTarget) error {
	env, err := environment(c.envFile, c.env.list)
	if err != nil {
		return err
	}
	cfg := t.config
	cfg.Env, cfg.User, cfg.WorkingDir = env, c.user, c.workdir
	cfg.Tty, cfg.OpenStdin, cfg.StdinOnce = c.tty, c.interactive, c.interactive
	if err := c.setAttach(cfg); err != nil {
		return err
	}
	t.host.GroupAdd, t.host.Ulimits, t.host.Umask = c.groupAdd, c.ulimits, c.umask.v
	cfg.StopSignal, cfg.StopTimeout = c.stopSignal, c.stopTimeout.v
	if t.set.Changed("entrypoint") {
		cfg.Entrypoint = []string{c.entrypoint} // [""] takes the image's away
	}
	if c.stopSignal != "" {
		if _, err := container.ParseSignal(c.stopSignal); err != nil {
			return err
		}
	}
	if c.workdir != "" && !strings.HasPrefix(c.workdir, "/") {
		return fmt.Errorf("the working directory '%s' is invalid, it needs to be an absolute path", c.workdir)
	}
	if t.set.Changed("init") {
		t.host.Init = &c.init
	}
	return nil
}

// setAttach sets which streams the client joins: without -a output and errors, with it those alone that it names. -i joins the input
// in any case.
func (c *processFlags) setAttach(cfg *apic.Config) error {
	none := len(c.attach) == 0
	cfg.AttachStdin, cfg.AttachStdout, cfg.AttachStderr = c.interactive, none, none
	for _, a := range c.attach {
		switch strings.ToLower(a) {
		case "stdin":
			cfg.AttachStdin = true
		case "stdout":
			cfg.AttachStdout = true
		case "stderr":
			cfg.AttachStderr = true
		default:
			return fmt.Errorf("invalid argument %q for \"-a, --attach\" flag: valid streams are STDIN, STDOUT and STDERR", a)
		}
	}
	return nil
}

// ulimitFlag are limits of resources, name=soft[:hard]; one that is given again counts.
type ulimitFlag []*units.Ulimit

func (u *ulimitFlag) Set(s string) error {
	l, err := units.ParseUlimit(s)
	if err != nil {
		return err
	}
	*u = append(slices.DeleteFunc(*u, func(o *units.Ulimit) bool { return o.Name == l.Name }), l)
	slices.SortFunc(*u, func(a, b *units.Ulimit) int { return strings.Compare(a.Name, b.Name) })
	return nil
}
func (u *ulimitFlag) Type() string   { return "ulimit" }
func (u *ulimitFlag) String() string { return "" }

// umaskFlag is a file mode mask, in octal.
type umaskFlag struct{ v *uint32 }

func (u *umaskFlag) Set(s string) error {
	n, err := strconv.ParseUint(s, 8, 32)
	if err != nil || n > 0o777 {
		return errors.New("must be an octal value from 0000 to 0777")
	}
	m := uint32(n)
	u.v = &m
	return nil
}
func (u *umaskFlag) Type() string   { return "umask" }
func (u *umaskFlag) String() string { return "" }
