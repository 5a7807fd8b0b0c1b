package cli

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"conex/internal/engine"
)

func (a *app) checkCommand() *cobra.Command {
	var req engine.CheckRequest
	var format string
	var quiet bool
	cmd := &cobra.Command{
		Use: "check [OPTIONS]", Short: "Verify everything that is stored", Args: a.exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			e, err := a.engine()
			if err != nil {
				return err
			}
			ctx, stop := a.interruptible(cmd.Context())
			defer stop()
			done := func() {}
			if f, ok := terminal(a.err); ok && !quiet {
				req.Progress, done = checkProgress(f)
			}
			r, err := e.Check(ctx, req)
			done()
			if err != nil {
				return err
			}
			if format != "" {
				err = writeOne(a.out, format, r)
			} else {
				err = printCheck(a.out, r, quiet)
			}
			if err == nil && !r.Clean() {
				return exit(1)
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&req.Repair, "repair", false, "Mend what is damaged, fetch it again or put it into quarantine, and remove leftovers")
	cmd.Flags().StringVarP(&format, "format", "f", "", inspectHelp)
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "Print problems only")
	return cmd
}

// checkProgress shows how far the check is; done clears the line.
func checkProgress(out io.Writer) (progress func(done, total int64), done func()) {
	var last time.Time
	shown := false
	return func(n, total int64) {
			if now := time.Now(); now.Sub(last) > 100*time.Millisecond && total > 0 {
				last, shown = now, true
				fmt.Fprintf(out, "\rVerifying %s of %s (%d%%)\x1b[K", units.HumanSize(float64(n)), units.HumanSize(float64(total)), n*100/total)
			}
		}, func() {
			if shown {
				fmt.Fprint(out, "\r\x1b[K")
			}
		}
}

// printCheck prints each finding with what to do about it, then one line that sums up.
func printCheck(out io.Writer, r engine.CheckReport, quiet bool) error {
	var b strings.Builder
	counts := map[string]int{}
	repaired := 0
	for _, f := range r.Findings {
		counts[f.Severity]++
		if f.Repaired != "" {
			repaired++
		}
		if quiet && f.Severity == engine.Leftover {
			continue
		}
		fmt.Fprintf(&b, "%s: %s %s: %s\n", f.Severity, f.Kind, strings.TrimPrefix(f.Name, "sha256:"), oneLine(f.Problem))
		switch {
		case f.Repaired != "":
			fmt.Fprintf(&b, "    repaired: %s\n", f.Repaired)
		case f.RepairError != "":
			fmt.Fprintf(&b, "    not repaired: %s\n", oneLine(f.RepairError))
			fallthrough
		case f.Advice != "":
			fmt.Fprintf(&b, "    to do: %s\n", f.Advice)
		}
	}
	if !quiet {
		fmt.Fprintf(&b, "Verified %s in %s and %s, with %s, %s and %s: ", units.HumanSize(float64(r.Bytes)), plural(r.Layers, "layer"), plural(r.Blobs, "blob"),
			plural(r.Images, "image"), plural(r.Containers, "container"), plural(r.Volumes, "volume"))
		var parts []string
		for _, s := range []struct{ kind, one string }{{engine.Damaged, "damage"}, {engine.Orphan, "orphan"}, {engine.Leftover, "leftover"}} {
			if n := counts[s.kind]; n > 0 {
				parts = append(parts, plural(n, s.one))
			}
		}
		if len(parts) == 0 {
			parts = []string{"all is well"}
		}
		b.WriteString(strings.Join(parts, ", "))
		if repaired > 0 {
			fmt.Fprintf(&b, "; %d repaired", repaired)
		}
		b.WriteString(".\n")
	}
	_, err := io.WriteString(out, b.String())
	return err
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
