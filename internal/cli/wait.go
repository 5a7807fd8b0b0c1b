package cli

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"
)

func (a *app) waitCommand() *cobra.Command {
	var condition string
	cmd := &cobra.Command{
		Use: "wait [OPTIONS] CONTAINER [CONTAINER...]", Short: "Block until one or more containers stop, then print their exit codes", Args: a.atLeast(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			e, err := a.engine()
			if err != nil {
				return err
			}
			var errs []error
			for _, c := range args {
				code, err := e.WaitFor(cmd.Context(), c, condition)
				if err != nil {
					errs = append(errs, err)
					continue
				}
				fmt.Fprintln(a.out, code)
			}
			return errors.Join(errs...)
		},
	}
	cmd.Flags().StringVar(&condition, "condition", "not-running", `What to wait for ("not-running", "next-exit", "removed", "healthy")`)
	return cmd
}

func (a *app) renameCommand() *cobra.Command {
	return &cobra.Command{
		Use: "rename CONTAINER NEW_NAME", Short: "Rename a container", Args: a.exactly(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			e, err := a.engine()
			if err != nil {
				return err
			}
			return e.Rename(cmd.Context(), args[0], args[1])
		},
	}
}
