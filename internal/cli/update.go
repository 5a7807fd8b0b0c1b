package cli

import (
	"errors"
	"fmt"

	apic "github.com/moby/moby/api/types/container"
	"github.com/spf13/cobra"

	"conex/internal/container"
)

func (a *app) updateCommand() *cobra.Command {
	var res resourceFlags
	var restart string
	var egress list
	cmd := &cobra.Command{
		Use: "update [OPTIONS] CONTAINER [CONTAINER...]", Short: "Update configuration of one or more containers", Args: a.atLeast(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if cmd.Flags().NFlag() == 0 {
				return errors.New("you must provide one or more flags when using this command")
			}
			var c container.Changes
			if restart != "" {
				p, err := parseRestart(restart)
				if err != nil {
					return err
				}
				c.RestartPolicy = p
			}
			c.Resources = apic.Resources{}
			res.fill(&c.Resources)
			if res.pidsLimit != 0 {
				c.PidsLimit = &res.pidsLimit
			}
			if len(egress) > 0 {
				c.Egress = (*[]string)(&egress)
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			var warnings []string
			err = a.each(args, func(name string) error {
				w, err := e.Update(cmd.Context(), name, c)
				warnings = append(warnings, w...)
				return err
			})
			for _, w := range warnings {
				fmt.Fprintln(a.out, w)
			}
			return err
		},
	}
	f := cmd.Flags()
	res.register(f)
	f.Var(&egress, "egress", `Let the container reach nothing but answers ("deny"), only what is listed ("allow=HOST[:PORT[/PROTO]],CIDR[:PORT[/PROTO]],..."), or anything ("any")`)
	f.StringVar(&restart, "restart", "", "Restart policy to apply when a container exits")
	return cmd
}
