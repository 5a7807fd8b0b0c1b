package cli

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"conex/internal/engine"
)

func (a *app) startCommand() *cobra.Command {
	var attach, interactive, sigProxy bool
	var keys string
	cmd := &cobra.Command{
		Use: "start [OPTIONS] CONTAINER [CONTAINER...]", Short: "Start one or more stopped containers", Args: a.atLeast(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			e, err := a.engine()
			if err != nil {
				return err
			}
			ctx := cmd.Context()
			if !attach && !interactive {
				return a.each(args, func(name string) error {
					_, err := e.Start(ctx, engine.StartRequest{Container: name})
					return startFailed(err)
				})
			}
			if len(args) > 1 {
				return errors.New("you cannot start and attach multiple containers at once")
			}
			c, err := e.InspectContainer(ctx, args[0], false)
			if err != nil {
				return err
			}
			stdin := interactive && c.Config.OpenStdin
			if err := a.checkTTY(stdin, c.Config.Tty); err != nil {
				return err
			}
			s, err := a.attach(sessionOptions{stdin: stdin, tty: c.Config.Tty, signals: sigProxy && !c.Config.Tty, detachKeys: keys})
			if err != nil {
				return err
			}
			defer s.close()
			code, err := e.Start(ctx, engine.StartRequest{Container: args[0], Attach: true, AttachStdin: stdin, Streams: s.streams})
			if err != nil {
				return startFailed(err)
			}
			return exit(code)
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&attach, "attach", "a", false, "Attach STDOUT/STDERR and forward signals")
	f.StringVar(&keys, "detach-keys", "", "Override the key sequence for detaching a container")
	f.BoolVarP(&interactive, "interactive", "i", false, "Attach container's STDIN")
	f.BoolVar(&sigProxy, "sig-proxy", true, "Proxy received signals to the process")
	refuseAll(f, "checkpoint", "checkpoint-dir")
	return cmd
}

// startFailed is the error of a start: 125 to 127 are run's and exec's codes, start's is 1, attached or not.
func startFailed(err error) error {
	var ge *engine.ExitError
	if errors.As(err, &ge) && ge.Err != nil && ge.Code >= 125 && ge.Code <= 127 {
		return ge.Err
	}
	return err
}

func (a *app) attachCommand() *cobra.Command {
	var noStdin, sigProxy bool
	var keys string
	cmd := &cobra.Command{
		Use:   "attach [OPTIONS] CONTAINER",
		Short: "Attach local standard input, output, and error streams to a running container", Args: a.exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			e, err := a.engine()
			if err != nil {
				return err
			}
			c, err := e.InspectContainer(cmd.Context(), args[0], false)
			if err != nil {
				return err
			}
			if c.State != nil && !c.State.Running {
				return fmt.Errorf("cannot attach to a stopped container, start it first")
			}
			stdin := !noStdin && c.Config.OpenStdin
			if err := a.checkTTY(stdin, c.Config.Tty); err != nil {
				return err
			}
			s, err := a.attach(sessionOptions{stdin: stdin, tty: c.Config.Tty, signals: sigProxy && !c.Config.Tty, redraw: true, detachKeys: keys})
			if err != nil {
				return err
			}
			defer s.close()
			code, err := e.Attach(cmd.Context(), engine.AttachRequest{Container: args[0], NoStdin: !stdin, Streams: s.streams})
			if err != nil {
				return err
			}
			return exit(code)
		},
	}
	f := cmd.Flags()
	f.StringVar(&keys, "detach-keys", "", "Override the key sequence for detaching a container")
	f.BoolVar(&noStdin, "no-stdin", false, "Do not attach STDIN")
	f.BoolVar(&sigProxy, "sig-proxy", true, "Proxy all received signals to the process")
	return cmd
}
