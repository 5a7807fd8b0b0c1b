package cli

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"conex/internal/engine"
)

func (a *app) saveCommand() *cobra.Command {
	var req engine.SaveRequest
	var output string
	cmd := &cobra.Command{
		Use: "save [OPTIONS] IMAGE [IMAGE...]", Short: "Save one or more images to a tar archive", Args: a.atLeast(1),
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
			progress := a.transferProgress(a.err, a.quietPipe(a.err))
			defer progress.close()
			req.Images, req.Progress = args, progress.event
			return a.output(output, func(w io.Writer) error {
				req.Output = w
				remarks, err := e.Save(ctx, req)
				progress.close()
				for _, r := range remarks {
					fmt.Fprintf(a.err, "%s: %s\n", a.name, clean(r))
				}
				return err
			})
		},
	}
	f := cmd.Flags()
	f.StringVarP(&output, "output", "o", "", "Write to a file, instead of STDOUT")
	f.StringVar(&req.Format, "format", "docker-archive", `Form of the archive: "docker-archive" or "oci-archive"`)
	f.StringVar(&req.Compression, "compression", "", `Compression of the layers: "none", "gzip" or "zstd" (default: as they came in an oci-archive, else none)`)
	f.StringSliceVar(&req.Platforms, "platform", nil, `Platforms to save ("linux/amd64,linux/arm64", or "all")`)
	a.progressFlag(f, a.err)
	return cmd
}

// quietPipe reports whether progress is left out as long as --progress does not ask for it: Docker shows that of save and load on a
// terminal alone.
func (a *app) quietPipe(out io.Writer) bool {
	_, tty := terminal(out)
	return !tty && (a.progress == "" || a.progress == "auto")
}
