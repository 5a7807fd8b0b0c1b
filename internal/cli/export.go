package cli

import (
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"conex/internal/engine"
)

// errTerminalTar is what a tar for standard output ends with when that is a terminal, in Docker's words.
var errTerminalTar = errors.New("cowardly refusing to save to a terminal. Use the -o flag or redirect")

func (a *app) exportCommand() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use: "export [OPTIONS] CONTAINER", Short: "Export a container's filesystem as a tar archive", Args: a.exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if _, tty := terminal(a.out); tty && output == "" {
				return errTerminalTar
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			ctx, stop := a.interruptible(cmd.Context())
			defer stop()
			return a.output(output, func(w io.Writer) error {
				return e.Export(ctx, engine.ExportRequest{Container: args[0], Output: w, Torn: func(path string) {
					fmt.Fprintf(a.err, "%s: /%s was cut off while it was read: it ends with zeros in the archive\n", a.name, path)
				}})
			})
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "", "Write to a file, instead of STDOUT")
	return cmd
}
