package cli

import (
	"errors"
	"os"

	"github.com/spf13/cobra"

	"conex/internal/engine"
)

func (a *app) execCommand() *cobra.Command {
	var req engine.ExecRequest
	var env envFlag
	var envFiles list
	var keys string
	cmd := &cobra.Command{
		Use: "exec [OPTIONS] CONTAINER COMMAND [ARG...]", Short: "Execute a command in a running container", Args: a.atLeast(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			if req.Env, err = environment(envFiles, env.list); err != nil {
				var pe *os.PathError
				if errors.As(err, &pe) { // Docker's is no mistake in the flags either
					return err
				}
				return a.usageError(cmd, err)
			}
			req.Container, req.Cmd = args[0], args[1:]
			if !req.Detach {
				if err := a.checkTTY(req.Interactive, req.Tty); err != nil {
					return err
				}
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			if !req.Detach {
				s, err := a.attach(sessionOptions{stdin: req.Interactive, tty: req.Tty, detachKeys: keys})
				if err != nil {
					return err
				}
				defer s.close()
				req.Streams = s.streams
			}
			code, err := e.Exec(cmd.Context(), req)
			var ge *engine.ExitError
			if req.Detach && errors.As(err, &ge) && ge.Err != nil {
				return ge.Err // 126 and 127 are for attached ones
			}
			if err != nil {
				return err
			}
			return exit(code)
		},
	}
	f := cmd.Flags()
	f.SetInterspersed(false)
	f.BoolVarP(&req.Detach, "detach", "d", false, "Detached mode: run command in the background")
	f.StringVar(&keys, "detach-keys", "", "Override the key sequence for detaching a container")
	f.VarP(&env, "env", "e", "Set environment variables")
	f.Var(&envFiles, "env-file", "Read in a file of environment variables")
	f.BoolVarP(&req.Interactive, "interactive", "i", false, "Keep STDIN open even if not attached")
	f.BoolVar(&req.Privileged, "privileged", false, "Give extended privileges to the command")
	f.BoolVarP(&req.Tty, "tty", "t", false, "Allocate a pseudo-TTY")
	f.StringVarP(&req.User, "user", "u", "", "Username or UID (format: <name|uid>[:<group|gid>])")
	f.StringVarP(&req.WorkingDir, "workdir", "w", "", "Working directory inside the container")
	return cmd
}
