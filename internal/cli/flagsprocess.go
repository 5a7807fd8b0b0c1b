package cli

import (
	"fmt"
	"strings"

	"github.com/spf13/pflag"

	"conex/internal/container"
)

// processFlags are about the first process: what it is, its streams, how it is stopped.
type processFlags struct {
	interactive, tty, init                bool
	entrypoint, stopSignal, user, workdir string
	stopTimeout                           optInt
	env, envFile                          list
}

func (c *processFlags) register(f *pflag.FlagSet) {
	f.StringVar(&c.entrypoint, "entrypoint", "", "Overwrite the default ENTRYPOINT of the image")
	f.VarP(&c.env, "env", "e", "Set environment variables")
	f.Var(&c.envFile, "env-file", "Read in a file of environment variables")
	f.BoolVar(&c.init, "init", false, "Run an init inside the container that forwards signals and reaps processes")
	f.BoolVarP(&c.interactive, "interactive", "i", false, "Keep STDIN open even if not attached")
	f.StringVar(&c.stopSignal, "stop-signal", "", "Signal to stop the container")
	f.Var(&c.stopTimeout, "stop-timeout", "Timeout (in seconds) to stop a container")
	f.BoolVarP(&c.tty, "tty", "t", false, "Allocate a pseudo-TTY")
	f.StringVarP(&c.user, "user", "u", "", "Username or UID (format: <name|uid>[:<group|gid>])")
	f.StringVarP(&c.workdir, "workdir", "w", "", "Working directory inside the container")
	refuseAll(f,
		"a|attach",
		"group-add",
		"ulimit",
	)
}

func (c *processFlags) apply(t *flagTarget) error {
	env, err := environment(c.envFile, c.env)
	if err != nil {
		return err
	}
	cfg := t.config
	cfg.Env, cfg.User, cfg.WorkingDir = env, c.user, c.workdir
	cfg.Tty, cfg.OpenStdin, cfg.StdinOnce = c.tty, c.interactive, c.interactive
	cfg.AttachStdin, cfg.AttachStdout, cfg.AttachStderr = c.interactive, true, true
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
