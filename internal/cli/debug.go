package cli

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/spf13/cobra"

	"conex/internal/build"
	"conex/internal/engine"
	"conex/internal/linux/mount"
)

func (a *app) debugCommand() *cobra.Command {
	var req engine.DebugRequest
	var env envFlag
	var envFiles list
	cmd := &cobra.Command{
		Use: "debug [OPTIONS] CONTAINER|IMAGE [COMMAND [ARG...]]", Short: "Open a shell with tools beside a container or image that has none", Args: a.atLeast(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			req.Name, req.Args = args[0], args[1:]
			if len(req.Args) > 0 && (req.Shell != "" || req.Script != "") {
				return a.usageError(cmd, errors.New("a command can't be used together with --shell or --command"))
			}
			var err error
			if req.Env, err = environment(envFiles, env.list); err != nil {
				return a.usageError(cmd, err)
			}
			if err := checkPull(req.Pull); err != nil {
				return a.usageError(cmd, err)
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			_, keys := terminal(a.in)
			_, screen := terminal(a.out)
			if err := becomeReadOnly(); err != nil {
				return err
			}
			c := &req.Console
			*c = build.Console{In: a.in, Out: a.out, Err: a.err, Terminal: keys && screen}
			if c.Terminal && len(req.Args) == 0 && req.Script == "" {
				req.Note = a.debugNote
			}
			ctx, stop := a.interruptible(cmd.Context())
			defer stop()
			code, err := a.atConsole(c, func() (int, error) { return e.Debug(ctx, req) })
			if err != nil {
				return err
			}
			return exit(code)
		},
	}
	f := cmd.Flags()
	f.SetInterspersed(false)
	f.StringVarP(&req.Script, "command", "c", "", "Have the shell run this line instead of reading commands")
	f.VarP(&env, "env", "e", "Set environment variables")
	f.Var(&envFiles, "env-file", "Read in a file of environment variables")
	f.StringVar(&req.Image, "image", "", `The toolbox: an image with a shell and tools (default: [debug] image of config.toml, or "busybox")`)
	f.BoolVar(&req.Privileged, "privileged", false, "Give extended privileges to the command")
	f.StringVar(&req.Pull, "pull", "missing", `Pull the toolbox before ("always", "missing", "never")`)
	f.StringVar(&req.Shell, "shell", "", "The shell (default: the toolbox's bash or sh)")
	f.StringVarP(&req.User, "user", "u", "", "Username or UID of the toolbox (format: <name|uid>[:<group|gid>])")
	f.StringVarP(&req.WorkingDir, "workdir", "w", "", "Working directory (default: the container's, below "+engine.DebugTarget+")")
	return cmd
}

// becomeReadOnly executes this program anew through a read-only mount. Until a debugger has executed its command it is a copy of this program
// among the container's processes, one of which may have the privilege to look at it and, through it, reach the file (CVE-2019-5736).
func becomeReadOnly() error {
	const done = "CONEX_READ_ONLY_SELF"
	if os.Getenv(done) != "" {
		return os.Unsetenv(done)
	}
	self, err := mount.ReadOnlySelf()
	if err != nil {
		return err
	}
	defer self.Close()
	err = syscall.Exec(fmt.Sprintf("/proc/self/fd/%d", self.Fd()), os.Args, append(os.Environ(), done+"=1"))
	return fmt.Errorf("execute own program: %w", err)
}

// checkPull refuses a --pull that is none.
func checkPull(when string) error {
	switch when {
	case "always", "missing", "never":
		return nil
	}
	return fmt.Errorf("invalid pull option: '%s': must be one of \"always\", \"missing\" or \"never\"", when)
}

// debugNote says where a shell is.
func (a *app) debugNote(what, name string) {
	fmt.Fprintf(a.err, "%s %s is at %s", what, clean(name), engine.DebugTarget)
	if what != "running container" {
		fmt.Fprint(a.err, "; changes are thrown away")
	}
	fmt.Fprint(a.err, "\r\n")
}
