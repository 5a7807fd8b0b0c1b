package cli

import "github.com/spf13/cobra"

func (a *app) teardownCommand() *cobra.Command {
	return &cobra.Command{
		Use: "teardown", Short: "Take down the bridge, the nftables table, mounts of images and layers; data stays", Args: a.exactly(0),
		Long: "Take down what conex keeps in the kernel while no container runs: its bridge,\n" +
			"nftables table and mounts. Images, containers and volumes stay; the next command\n" +
			"that needs something sets it up again.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			e, err := a.engine()
			if err != nil {
				return err
			}
			return e.Teardown(cmd.Context())
		},
	}
}
