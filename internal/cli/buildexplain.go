package cli

import (
	"bufio"
	"cmp"
	"fmt"

	"github.com/spf13/cobra"

	"conex/internal/analyze"
	"conex/internal/engine"
)

func (a *app) buildDiffCommand() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use: "diff [OPTIONS] STEP [BUILD|IMAGE]", Short: "Show which files a step of a build added, changed and removed (default: of the last build)", Args: a.between(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if format != "" && format != "json" {
				return a.usageError(cmd, fmt.Errorf("--format knows json only"))
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			ctx, stop := a.interruptible(cmd.Context())
			defer stop()
			d, err := e.DiffStep(ctx, args[0], first(args[1:]))
			if err != nil {
				return err
			}
			if format == "json" {
				return writeOne(a.out, "json", d)
			}
			return a.printStepDiff(d)
		},
	}
	cmd.Flags().StringVar(&format, "format", "", "Print the changes as \"json\"")
	return cmd
}

func (a *app) printStepDiff(d *engine.StepDiff) error {
	w := bufio.NewWriter(a.out)
	fmt.Fprintf(w, "#%d %s\n", d.Step, clean(d.Name))
	for _, c := range d.Changes {
		size := ""
		switch {
		case c.Type != "file" && c.Type != "regular":
		case c.Change == analyze.Changed && c.Was != c.Size:
			size = fmt.Sprintf(" (%s, was %s)", humanSize(c.Size), humanSize(c.Was))
		default:
			size = " (" + humanSize(c.Size) + ")"
		}
		fmt.Fprintf(w, "%c %s%s\n", c.Change.Letter(), analyze.Printable(c.Path), size)
	}
	fmt.Fprintf(w, "%d added, %d changed, %d removed, %s\n", d.Counts["added"], d.Counts["changed"], d.Counts["removed"], humanSize(d.Size))
	return w.Flush()
}

func (a *app) buildWhichCommand() *cobra.Command {
	var format, platform string
	cmd := &cobra.Command{
		Use: "which [OPTIONS] PATH IMAGE", Short: "Show which step made a file of an image", Args: a.exactly(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			e, err := a.engine()
			if err != nil {
				return err
			}
			ctx, stop := a.interruptible(cmd.Context())
			defer stop()
			found, err := e.WhichStep(ctx, args[0], args[1], platform)
			if err != nil {
				return err
			}
			if format != "" {
				return writeOne(a.out, format, found)
			}
			a.printWhich(found)
			for i := range found.Before {
				a.printWhich(&found.Before[i])
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&format, "format", "", formatHelp)
	cmd.Flags().StringVar(&platform, "platform", "", platformHelp)
	return cmd
}

// printWhich prints what one layer did to a path and what made the layer.
func (a *app) printWhich(w *engine.Which) {
	size := ""
	if w.Type == "file" || w.Type == "regular" {
		size = " (" + humanSize(w.Size) + ")"
	}
	fmt.Fprintf(a.out, "%s %s%s by %s\n", analyze.Printable(w.Path), w.Change, size, cmp.Or(analyze.Instruction(w.CreatedBy), "a layer that the image's history does not tell of"))
	fmt.Fprintf(a.out, "  layer %d %s\n", w.Index, short(string(w.Layer)))
	switch {
	case w.Base:
		fmt.Fprintf(a.out, "  of the base image %s\n", clean(w.From))
	case w.Build != "":
		at := ""
		if w.Line > 0 {
			at = fmt.Sprintf(", %s:%d", clean(w.File), w.Line)
		}
		fmt.Fprintf(a.out, "  step #%d %s%s of build %s\n", w.Step, clean(w.Name), at, w.Build)
	}
}
