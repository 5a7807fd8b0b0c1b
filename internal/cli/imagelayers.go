package cli

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"conex/internal/analyze"
)

// platformHelp describes --platform where it chooses among the images of a name.
const platformHelp = "Of the images that the name leads to take that of a platform (os[/arch[/variant]])"

func (a *app) imageLayersCommand() *cobra.Command {
	var noTrunc bool
	var format, platform string
	cmd := &cobra.Command{
		Use: "layers [OPTIONS] IMAGE", Short: "Show what each layer of an image did", Args: a.exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			e, err := a.engine()
			if err != nil {
				return err
			}
			ctx, stop := a.interruptible(cmd.Context())
			defer stop()
			img, err := e.AnalyzeImage(ctx, args[0], platform)
			if err != nil {
				return err
			}
			head := headings{"Layer": "LAYER", "ID": "LAYER ID", "Instruction": "INSTRUCTION", "CreatedBy": "CREATED BY", "Created": "CREATED", "Size": "SIZE",
				"Added": "ADDED", "Changed": "CHANGED", "Removed": "REMOVED", "Wasted": "WASTED", "Hides": "HIDES", "SharedWith": "SHARED WITH", "Entries": "ENTRIES",
				"TarSize": "TAR SIZE", "Comment": "COMMENT"}
			def := `{{.Layer}}\t{{.ID}}\t{{.Instruction}}\t{{.Size}}\t{{.Added}}\t{{.Changed}}\t{{.Removed}}\t{{.Wasted}}\t{{.SharedWith}}`
			if err := writeList(a.out, format, def, head, layerRows(img, !noTrunc)); err != nil {
				return err
			}
			if format == "" || format == "table" {
				fmt.Fprintf(a.out, "\n%s\n", scoreLine(img))
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&format, "format", "", formatHelp)
	f.BoolVar(&noTrunc, "no-trunc", false, "Don't truncate output")
	f.StringVar(&platform, "platform", "", platformHelp)
	return cmd
}

// layerRow is a line of image layers; its fields, in the order of their JSON form, are what templates may name.
type layerRow struct {
	Added, Changed, Comment, Created, CreatedBy, Entries, Hides, ID, Instruction, Layer, Removed, SharedWith, Size, TarSize, Wasted string
}

func layerRows(img *analyze.Image, trunc bool) []layerRow {
	rows := make([]layerRow, len(img.Layers))
	for i, l := range img.Layers {
		r := layerRow{Layer: strconv.Itoa(i), ID: string(l.DiffID), Instruction: instruction(l), CreatedBy: analyze.Line(l.CreatedBy), Comment: analyze.Line(l.Comment),
			Entries: strconv.Itoa(l.Entries), Added: strconv.Itoa(l.Added), Changed: strconv.Itoa(l.Changed), Removed: strconv.Itoa(l.Removed),
			Size: humanSize(l.Size), TarSize: humanSize(l.TarSize), Wasted: humanSize(l.Wasted), Hides: humanSize(l.Hides), SharedWith: sharedWith(l.SharedWith, trunc)}
		if !l.Created.IsZero() {
			r.Created = l.Created.String()
		}
		if trunc {
			r.ID, r.Instruction, r.CreatedBy = short(r.ID), ellipsis(r.Instruction, 45), ellipsis(r.CreatedBy, 45)
		}
		rows[i] = r
	}
	return rows
}

// sharedWith names images in a line, and when cut two of them at most.
func sharedWith(names []string, trunc bool) string {
	if n := len(names); trunc && n > 2 {
		return fmt.Sprintf("%s, %s and %d more", names[0], names[1], n-2)
	}
	return strings.Join(names, ", ")
}

// instruction is what made the layer, in the words of a Dockerfile.
func instruction(l analyze.Layer) string {
	if s := analyze.Instruction(l.CreatedBy); s != "" {
		return s
	}
	if s := analyze.Line(l.Comment); s != "" {
		return s
	}
	return "(not in the history)"
}

func humanSize(n int64) string { return units.HumanSizeWithPrecision(float64(n), 3) }

// scoreLine is the image's efficiency in a sentence.
func scoreLine(img *analyze.Image) string {
	s := fmt.Sprintf("efficiency %s: %s of %s wasted", percent(img.Efficiency()), humanSize(img.Wasted), humanSize(img.Size))
	if n := len(img.Waste); n > 0 {
		s += fmt.Sprintf(" in %s", countOf(n, "file", "files"))
	}
	return s
}

// percent shows a share with two digits behind the point, rounded down: a gate of 95% that fails must not show 95.00%.
func percent(x float64) string {
	return strconv.FormatFloat(float64(int64(x*1e4+1e-9))/100, 'f', 2, 64) + "%"
}

func countOf(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return strconv.Itoa(n) + " " + many
}

// share is a flag that is a number from 0 to 1, or a percentage.
type share struct {
	v   float64
	set bool
}

func (s *share) Set(text string) error {
	num, pct := strings.CutSuffix(strings.TrimSpace(text), "%")
	v, err := strconv.ParseFloat(strings.TrimSpace(num), 64)
	if pct {
		v /= 100
	}
	if err != nil || !(v >= 0 && v <= 1) {
		return fmt.Errorf("want a number from 0 to 1, or a percentage: 0.95 or 95%%")
	}
	s.v, s.set = v, true
	return nil
}
func (s *share) Type() string   { return "share" }
func (s *share) String() string { return "" }

func (a *app) imageExploreCommand() *cobra.Command {
	var format, platform string
	var gate share
	var maxWasted bytesFlag
	cmd := &cobra.Command{
		Use: "explore [OPTIONS] IMAGE", Short: "Look at the layers and files of an image, full screen", Args: a.exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if format != "" && format != "json" {
				return a.usageError(cmd, fmt.Errorf("--format knows json only; `%s image layers` takes templates", a.name))
			}
			limited := cmd.Flags().Changed("max-wasted")
			if format == "" && !gate.set && !limited {
				return a.explore(cmd.Context(), args[0], platform)
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			ctx, stop := a.interruptible(cmd.Context())
			defer stop()
			img, err := e.AnalyzeImage(ctx, args[0], platform)
			if err != nil {
				return err
			}
			if format == "json" {
				err = img.WriteJSON(a.out)
			} else {
				_, err = fmt.Fprintln(a.out, scoreLine(img))
			}
			if err != nil {
				return err
			}
			var over []string
			if gate.set && img.Efficiency() < gate.v {
				over = append(over, fmt.Sprintf("efficiency %s is below %s", percent(img.Efficiency()), percent(gate.v)))
			}
			if limited && img.Wasted > int64(maxWasted) {
				over = append(over, fmt.Sprintf("%s wasted, more than %s", humanSize(img.Wasted), humanSize(int64(maxWasted))))
			}
			if len(over) > 0 {
				return fmt.Errorf("%s: %s%s", args[0], strings.Join(over, " and "), worst(img, 5))
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&format, "format", "", "Print all that is known about the image as \"json\" instead")
	f.StringVar(&platform, "platform", "", platformHelp)
	f.Var(&gate, "min-efficiency", "Fail if the image's efficiency is below this, for example 0.95 or 95%")
	f.Var(&maxWasted, "max-wasted", "Fail if more bytes than this are wasted, for example 20m")
	return cmd
}

// worst names the files that waste most.
func worst(img *analyze.Image, n int) string {
	if len(img.Waste) == 0 {
		return ""
	}
	var parts []string
	for _, w := range img.Waste[:min(n, len(img.Waste))] {
		parts = append(parts, fmt.Sprintf("/%s (%s in %s)", analyze.Printable(w.Path), humanSize(w.Bytes), countOf(w.Copies, "copy", "copies")))
	}
	return "; worst: " + strings.Join(parts, ", ")
}
