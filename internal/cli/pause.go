package cli

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"conex/internal/engine"
)

func (a *app) pauseCommand() *cobra.Command {
	return a.pauseLike("pause", "Pause all processes within one or more containers", (*engine.Engine).Pause)
}

func (a *app) unpauseCommand() *cobra.Command {
	return a.pauseLike("unpause", "Unpause all processes within one or more containers", (*engine.Engine).Unpause)
}

func (a *app) pauseLike(name, short string, do func(*engine.Engine, context.Context, string) error) *cobra.Command {
	return &cobra.Command{
		Use: name + " CONTAINER [CONTAINER...]", Short: short, Args: a.atLeast(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			e, err := a.engine()
			if err != nil {
				return err
			}
			return errors.Join(a.together(args, func(c string) error { return do(e, cmd.Context(), c) })...)
		},
	}
}
