package cli

import (
	"github.com/spf13/cobra"

	"conex/internal/engine"
	"conex/internal/image"
)

func (a *app) pushCommand() *cobra.Command {
	var req engine.PushRequest
	var level int
	cmd := &cobra.Command{
		Use: "push [OPTIONS] NAME[:TAG]", Short: "Upload an image to a registry", Args: a.exactly(1),
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
			if !req.AllTags && !image.HasTag(args[0]) {
				progress.event(engine.Event{Message: "Using default tag: " + image.DefaultTag})
			}
			ctx, stop := a.interruptible(cmd.Context())
			defer stop()
			req.Reference, req.Progress = args[0], progress.event
			if cmd.Flags().Changed("compression-level") {
				req.Level = &level
			}
			done, err := e.Push(ctx, req)
			progress.close()
			if err != nil {
				return err
			}
			for _, st := range done {
				progress.aux(map[string]any{"Tag": st.Tag, "Digest": st.Digest, "Size": st.Size})
				if req.Quiet {
					progress.result("Reference", ref.Name()+":"+st.Tag)
				}
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&req.AllTags, "all-tags", "a", false, "Push all tags of an image to the repository")
	f.BoolVarP(&req.Quiet, "quiet", "q", false, "Suppress verbose output")
	f.StringVar(&req.Platform, "platform", "", "Push a platform's image alone, without the index (os[/arch[/variant]])")
	f.StringVar(&req.Compression, "compression", "", `Send all layers compressed with "gzip" or "zstd" (default: as they were pulled, else gzip)`)
	f.IntVar(&level, "compression-level", 0, "Level of the compression: gzip 0 to 9 (default 5), zstd 1 to 22 (default 1)")
	a.progressFlag(f, a.out)
	refuseAll(f, "disable-content-trust?")
	return cmd
}
