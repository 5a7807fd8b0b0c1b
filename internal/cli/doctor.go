package cli

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"conex/internal/doctor"
	"conex/internal/engine"
)

func (a *app) doctorCommand() *cobra.Command {
	var verbose bool
	var format string
	cmd := &cobra.Command{
		Use: "doctor [OPTIONS]", Short: "Look at kernel, storage and network, and say how to mend what is missing", Args: a.exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := a.configuration()
			if err != nil {
				return err
			}
			d := engine.Doctor(cmd.Context(), cfg)
			if format != "" {
				err = writeOne(a.out, format, d)
			} else {
				err = printDiagnosis(a.out, d, verbose)
			}
			if err == nil && d.Broken > 0 {
				return exit(1)
			}
			return err
		},
	}
	cmd.Flags().BoolVarP(&verbose, "verbose", "v", false, "Print all that was seen")
	cmd.Flags().StringVarP(&format, "format", "f", "", inspectHelp)
	return cmd
}

// printDiagnosis prints a line a check, below it what to do about what is not well, and one line that sums up.
func printDiagnosis(out io.Writer, d engine.Diagnosis, verbose bool) error {
	var b strings.Builder
	for _, r := range d.Results {
		fmt.Fprintf(&b, "%-8s  %-13s  %s\n", r.Level, r.Check, clean(oneLine(r.Found)))
		if r.Mend != "" && r.Level != doctor.OK {
			fmt.Fprintf(&b, "%25s> %s\n", "", clean(oneLine(r.Mend)))
		}
		if !verbose {
			continue
		}
		for _, s := range r.Details {
			fmt.Fprintf(&b, "%25s- %s\n", "", clean(oneLine(s)))
		}
	}
	fmt.Fprintf(&b, "%d ok, %d degraded, %d broken", d.OK, d.Degraded, d.Broken)
	if d.Unknown > 0 {
		fmt.Fprintf(&b, ", %d could not be looked at", d.Unknown)
	}
	b.WriteString(".\n")
	_, err := io.WriteString(out, b.String())
	return err
}
