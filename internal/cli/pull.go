package cli

import (
	"fmt"
	"runtime"

	"github.com/spf13/cobra"

	"conex/internal/engine"
	"conex/internal/image"
)

func (a *app) pullCommand() *cobra.Command {
	var req engine.PullRequest
	var all bool
	cmd := &cobra.Command{
		Use: "pull [OPTIONS] NAME[:TAG|@DIGEST]", Short: "Download an image from a registry", Args: a.exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ref, err := image.ParseReference(args[0])
			if err != nil {
				return err
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			progress := a.transferProgress(a.out, req.Quiet)
			defer progress.close()
			if !all && !image.HasTag(args[0]) {
				progress.event(engine.Event{Message: "Using default tag: " + image.DefaultTag})
			}
			ctx, stop := a.interruptible(cmd.Context())
			defer stop()
			req.Reference, req.Progress = args[0], progress.event
			reference := ref.String()
			if all {
				reference, err = ref.Name(), e.PullAll(ctx, req)
			} else {
				_, _, err = e.Pull(ctx, req)
			}
			progress.close()
			if err != nil {
				return err
			}
			progress.result("Reference", reference)
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&req.Platform, "platform", "", "Pull the image for this platform instead of "+runtime.GOOS+"/"+runtime.GOARCH)
	f.BoolVarP(&req.Quiet, "quiet", "q", false, "Suppress verbose output")
	a.progressFlag(f, a.out)
	f.BoolVarP(&all, "all-tags", "a", false, "Download all tagged images in the repository")
	refuseAll(f, "disable-content-trust?")
	return cmd
}

func (a *app) importCommand() *cobra.Command {
	var req engine.ImportRequest
	var changes list
	cmd := &cobra.Command{
		Use: "import [OPTIONS] file|URL|- [REPOSITORY[:TAG]]", Short: "Import the contents from a tarball to create a filesystem image", Args: a.between(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			req.Source, req.Changes = args[0], changes
			if len(args) > 1 {
				req.Reference = args[1]
			}
			if req.Source == "-" {
				req.Stdin = a.in
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			ctx, stop := a.interruptible(cmd.Context())
			defer stop()
			progress := a.transferProgress(a.err, false)
			defer progress.close()
			req.Progress = progress.event
			id, err := e.Import(ctx, req)
			progress.close()
			if err != nil {
				return err
			}
			fmt.Fprintln(a.out, id)
			return nil
		},
	}
	f := cmd.Flags()
	f.VarP(&changes, "change", "c", "Apply Dockerfile instruction to the created image")
	f.StringVarP(&req.Message, "message", "m", "", "Set commit message for imported image")
	f.StringVar(&req.Platform, "platform", "", "Set the platform of the image")
	a.progressFlag(f, a.err)
	return cmd
}
