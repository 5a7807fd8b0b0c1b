package cli

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"conex/internal/engine"
)

const statsTable = `{{.ID}}\t{{.Name}}\t{{.CPUPerc}}\t{{.MemUsage}}\t{{.MemPerc}}\t{{.NetIO}}\t{{.BlockIO}}\t{{.PIDs}}`

func (a *app) statsCommand() *cobra.Command {
	var req engine.StatsRequest
	var noTrunc bool
	var format string
	cmd := &cobra.Command{
		Use: "stats [OPTIONS] [CONTAINER...]", Short: "Display a live stream of container(s) resource usage statistics", Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			for i, name := range args {
				if !slices.Contains(args[:i], name) {
					req.Containers = append(req.Containers, name)
				}
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			ctx, stop := a.interruptible(cmd.Context())
			defer stop()
			out := io.Writer(a.out)
			if _, ok := terminal(a.out); ok && !req.Once {
				out = &repaint{out: a.out}
			}
			head := headings{"ID": "CONTAINER ID", "Name": "NAME", "Container": "CONTAINER", "CPUPerc": "CPU %", "MemUsage": "MEM USAGE / LIMIT", "MemPerc": "MEM %",
				"NetIO": "NET I/O", "BlockIO": "BLOCK I/O", "PIDs": "PIDS"}
			req.Emit = func(list []engine.ContainerStats) error {
				rows := make([]statsRow, len(list))
				for i := range list {
					rows[i] = newStatsRow(&list[i], !noTrunc)
				}
				var b bytes.Buffer
				if err := writeList(&b, format, statsTable, head, rows); err != nil {
					return err
				}
				_, err := out.Write(b.Bytes())
				return err
			}
			return e.Stats(ctx, req)
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&req.All, "all", "a", false, "Show all containers (default shows just running)")
	f.StringVar(&format, "format", "", formatHelp)
	f.BoolVar(&req.Once, "no-stream", false, "Disable streaming stats and only pull the first result")
	f.BoolVar(&noTrunc, "no-trunc", false, "Do not truncate output")
	return cmd
}

// statsRow is a line of stats; its fields, in the order of their JSON form, are what templates may name.
type statsRow struct {
	BlockIO, CPUPerc, Container, ID, MemPerc, MemUsage, Name, NetIO, PIDs string
}

func newStatsRow(s *engine.ContainerStats, trunc bool) statsRow {
	size := func(n uint64) string { return units.HumanSizeWithPrecision(float64(n), 3) }
	r := statsRow{
		BlockIO: size(s.BlockRead) + " / " + size(s.BlockWrite), NetIO: size(s.NetRx) + " / " + size(s.NetTx), CPUPerc: fmt.Sprintf("%.2f%%", s.CPU),
		Container: clean(s.Asked), ID: s.ID, Name: clean(s.Name), MemPerc: "0.00%", PIDs: fmt.Sprint(s.Pids),
		MemUsage: units.BytesSize(float64(s.Memory)) + " / " + units.BytesSize(float64(s.MemoryLimit)),
	}
	if s.MemoryLimit > 0 {
		r.MemPerc = fmt.Sprintf("%.2f%%", float64(s.Memory)/float64(s.MemoryLimit)*100)
	}
	if trunc {
		r.ID = short(s.ID)
	}
	return r
}

// repaint writes every text over the one before it, line by line: a terminal that is cleared first would flicker.
type repaint struct {
	out  io.Writer
	some bool
}

func (p *repaint) Write(text []byte) (int, error) {
	var b strings.Builder
	if !p.some {
		b.WriteString("\x1b[2J")
		p.some = true
	}
	b.WriteString("\x1b[H")
	for line := range strings.Lines(string(text)) {
		b.WriteString(strings.TrimSuffix(line, "\n") + "\x1b[K\n")
	}
	b.WriteString("\x1b[J")
	if _, err := io.WriteString(p.out, b.String()); err != nil {
		return 0, err
	}
	return len(text), nil
}
