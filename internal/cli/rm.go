package cli

import (
	"errors"

	"github.com/spf13/cobra"

	"conex/internal/container"
	"conex/internal/engine"
	"conex/internal/image"
)

func (a *app) rmCommand() *cobra.Command {
	var force, volumes bool
	cmd := &cobra.Command{
		Use: "rm [OPTIONS] CONTAINER [CONTAINER...]", Short: "Remove one or more containers", Args: a.atLeast(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			e, err := a.engine()
			if err != nil {
				return err
			}
			return a.forgiveMissing(force, a.together(args, func(c string) error {
				return e.RemoveContainer(cmd.Context(), engine.RemoveRequest{Container: c, Force: force, Volumes: volumes})
			}))
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&force, "force", "f", false, "Force the removal of a running container (uses SIGKILL)")
	f.BoolVarP(&volumes, "volumes", "v", false, "Remove anonymous volumes associated with the container")
	refuse(f, "link", "l", "bool", "a link stays as long as its container: make that again without --link, or use a network's names")
	return cmd
}

// forgiveMissing reports errors of a removal by force that only say that a thing is not there, and lets the command succeed then.
func (a *app) forgiveMissing(force bool, errs []error) error {
	for _, err := range errs {
		if !force || !errors.Is(err, container.ErrNotFound) && !errors.Is(err, image.ErrNotFound) {
			return errors.Join(errs...)
		}
	}
	a.report(errors.Join(errs...))
	return nil
}
