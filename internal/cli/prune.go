package cli

import (
	"bufio"
	"fmt"
	"strings"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"
)

func (a *app) builderPruneCommand() *cobra.Command {
	var force, all bool
	cmd := &cobra.Command{
		Use: "prune [OPTIONS]", Short: "Remove the build cache", Args: a.exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !force {
				fmt.Fprint(a.out, "WARNING! This will remove all build cache. Are you sure you want to continue? [y/N] ")
				answer, err := bufio.NewReader(a.in).ReadString('\n')
				if a := strings.ToLower(strings.TrimSpace(answer)); a != "y" && a != "yes" {
					return nil //nolint:nilerr // no answer is a no
				} else if err != nil {
					return err
				}
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			freed, deferred, err := e.PruneBuildCache(cmd.Context())
			if err != nil {
				return err
			}
			if deferred {
				fmt.Fprintln(a.err, "A pull or build is running: layers that only the cache used are removed when it ends.")
			}
			fmt.Fprintf(a.out, "Total reclaimed space: %s\n", units.HumanSize(float64(freed)))
			return nil
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "Do not prompt for confirmation")
	// Without it Docker keeps what a named image still shows; here such layers stay anyway, since the image holds them.
	cmd.Flags().BoolVarP(&all, "all", "a", false, "Remove all unused build cache, not just dangling ones (always so)")
	refuseAll(cmd.Flags(), "filter", "keep-storage")
	return cmd
}
