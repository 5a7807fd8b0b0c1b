package cli

import (
	"fmt"

	"github.com/spf13/cobra"

	"conex/internal/engine"
)

func (a *app) commitCommand() *cobra.Command {
	var req engine.CommitRequest
	var changes list
	var pause bool
	cmd := &cobra.Command{
		Use: "commit [OPTIONS] CONTAINER [REPOSITORY[:TAG]]", Short: "Create a new image from a container's changes", Args: a.between(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			req.Container, req.Changes, req.Version = args[0], changes, Version
			if len(args) > 1 {
				req.Reference = args[1]
			}
			req.NoPause = req.NoPause || !pause
			req.Torn = func(path string) {
				fmt.Fprintf(a.err, "%s: /%s was cut off while it was read: it ends with zeros in the image\n", a.name, path)
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			ctx, stop := a.interruptible(cmd.Context())
			defer stop()
			id, err := e.Commit(ctx, req)
			if err != nil {
				return err
			}
			fmt.Fprintln(a.out, id)
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVarP(&req.Author, "author", "a", "", `Author (e.g., "John Hannibal Smith <hannibal@a-team.com>")`)
	f.VarP(&changes, "change", "c", "Apply Dockerfile instruction to the created image")
	f.StringVarP(&req.Message, "message", "m", "", "Commit message")
	f.BoolVarP(&pause, "pause", "p", true, "Pause container during commit")
	f.BoolVar(&req.NoPause, "no-pause", false, "Do not pause the container during commit")
	return cmd
}
