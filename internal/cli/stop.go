package cli

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"conex/internal/engine"
)

func (a *app) stopCommand() *cobra.Command {
	return a.stopLike("stop", "Stop one or more running containers", (*engine.Engine).Stop)
}

func (a *app) restartCommand() *cobra.Command {
	return a.stopLike("restart", "Restart one or more containers", (*engine.Engine).Restart)
}

func (a *app) stopLike(name, short string, do func(*engine.Engine, context.Context, string, engine.StopRequest) error) *cobra.Command {
	var req engine.StopRequest
	var timeout optInt
	cmd := &cobra.Command{
		Use: name + " [OPTIONS] CONTAINER [CONTAINER...]", Short: short, Args: a.atLeast(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			e, err := a.engine()
			if err != nil {
				return err
			}
			req.Timeout = timeout.v
			return errors.Join(a.together(args, func(c string) error { return do(e, cmd.Context(), c, req) })...)
		},
	}
	f := cmd.Flags()
	f.StringVarP(&req.Signal, "signal", "s", "", "Signal to send to the container")
	f.VarP(&timeout, "timeout", "t", "Seconds to wait before killing the container")
	f.Var(&timeout, "time", "")
	f.Lookup("time").Hidden = true // Docker's old name
	return cmd
}

func (a *app) killCommand() *cobra.Command {
	var signal string
	cmd := &cobra.Command{
		Use: "kill [OPTIONS] CONTAINER [CONTAINER...]", Short: "Kill one or more running containers", Args: a.atLeast(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			e, err := a.engine()
			if err != nil {
				return err
			}
			return errors.Join(a.together(args, func(c string) error { return e.Kill(cmd.Context(), c, signal) })...)
		},
	}
	cmd.Flags().StringVarP(&signal, "signal", "s", "KILL", "Signal to send to the container")
	return cmd
}
