package cli

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"
)

func (a *app) whyCommand() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use: "why [OPTIONS] CONTAINER [CONTAINER...]", Short: "Say how containers ended, or why they do not start", Args: a.atLeast(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			e, err := a.engine()
			if err != nil {
				return err
			}
			var errs []error
			for i, name := range args {
				r, err := e.Why(cmd.Context(), name)
				if err != nil {
					errs = append(errs, err)
					continue
				}
				if format != "" {
					if err := writeOne(a.out, format, r); err != nil {
						return err
					}
					continue
				}
				if i > 0 {
					fmt.Fprintln(a.out)
				}
				fmt.Fprintln(a.out, cleanLines(r.Summary))
				if len(r.Log) > 0 {
					fmt.Fprintln(a.out, "The last lines of its log:")
				}
				for _, l := range r.Log {
					fmt.Fprintln(a.out, "    "+clean(l))
				}
			}
			return errors.Join(errs...)
		},
	}
	cmd.Flags().StringVarP(&format, "format", "f", "", inspectHelp)
	return cmd
}
