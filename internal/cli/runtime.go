package cli

import (
	"conex/internal/ocicli"

	"github.com/spf13/cobra"
)

// runtimeCommand is for help, and for global options before the word: `conex runtime ...` itself never gets here, package ocicli takes
// it over before the command line exists.
func (a *app) runtimeCommand() *cobra.Command {
	return &cobra.Command{
		Use: "runtime [OPTIONS] COMMAND", Short: "The OCI runtime command line (create, start, state, kill, delete, ...), as conex-runtime",
		DisableFlagParsing: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 && args[0] == "--help" {
				return cmd.Help()
			}
			if code := ocicli.Main(args); code != 0 {
				return &exitError{code: code}
			}
			return nil
		},
	}
}
