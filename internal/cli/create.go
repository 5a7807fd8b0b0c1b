package cli

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"conex/internal/engine"
)

func (a *app) createCommand() *cobra.Command {
	var c containerFlags
	cmd := &cobra.Command{
		Use: "create [OPTIONS] IMAGE [COMMAND] [ARG...]", Short: "Create a new container", Args: a.atLeast(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			req, err := a.createRequest(cmd, &c, args)
			if err != nil {
				return err
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			ctx, stop := a.interruptible(cmd.Context())
			defer stop()
			progress := a.pullProgress(a.err, c.meta.quiet)
			defer progress.close()
			req.Progress = progress.event
			res, err := e.Create(ctx, req)
			progress.close()
			if err != nil {
				return err
			}
			for _, w := range res.Warnings {
				fmt.Fprintf(a.err, "WARNING: %s\n", w)
			}
			if err := writeCIDFile(c.meta.cidfile, res.ID); err != nil { // nobody would find it
				return errors.Join(err, e.RemoveContainer(context.WithoutCancel(ctx), engine.RemoveRequest{Container: res.ID, Volumes: true}))
			}
			fmt.Fprintln(a.out, res.ID)
			return nil
		},
	}
	c.register(cmd.Flags())
	return cmd
}
