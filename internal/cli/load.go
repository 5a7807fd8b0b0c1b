package cli

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"conex/internal/engine"
)

func (a *app) loadCommand() *cobra.Command {
	var req engine.LoadRequest
	var quiet bool
	cmd := &cobra.Command{
		Use: "load [OPTIONS]", Short: "Load images from a tar archive, a folder or STDIN", Args: a.exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if req.Input == "" {
				if _, tty := terminal(a.in); tty {
					return errors.New("requested load from stdin, but stdin is empty")
				}
				req.Stdin = a.in
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			ctx, stop := a.interruptible(cmd.Context())
			defer stop()
			progress := a.transferProgress(a.out, quiet || a.quietPipe(a.out))
			defer progress.close()
			req.Progress = progress.event
			loaded, err := e.Load(ctx, req)
			progress.close()
			if err != nil {
				return err
			}
			for _, l := range loaded {
				switch {
				case l.Reference == "":
					progress.result("ID", "Loaded image ID: "+l.ID)
					continue
				case l.Replaced != "":
					progress.result("Renamed", fmt.Sprintf("The image %s already exists, renaming the old one with ID %s to empty string", l.Reference, l.Replaced))
				}
				progress.result("Reference", "Loaded image: "+l.Reference)
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVarP(&req.Input, "input", "i", "", "Read from a tar archive file or a folder, instead of STDIN")
	f.BoolVarP(&quiet, "quiet", "q", false, "Suppress the load output")
	f.StringSliceVar(&req.Platforms, "platform", nil, `Load only these platforms ("linux/amd64,linux/arm64")`)
	a.progressFlag(f, a.out)
	return cmd
}
