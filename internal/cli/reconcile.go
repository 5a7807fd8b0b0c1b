package cli

import (
	"fmt"

	"github.com/spf13/cobra"
)

func (a *app) reconcileCommand() *cobra.Command {
	var shutdown bool
	cmd := &cobra.Command{
		Use: "reconcile [OPTIONS]", Short: "Settle containers and start those that should run, as at boot", Args: a.exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			e, err := a.engine()
			if err != nil {
				return err
			}
			do := e.Reconcile
			if shutdown {
				do = e.Shutdown
			}
			names, err := do(cmd.Context())
			for _, name := range names {
				fmt.Fprintln(a.out, name)
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&shutdown, "shutdown", false, "Stop all containers instead, as a machine does that goes down: the next reconcile starts them again as their restart policies say")
	return cmd
}
