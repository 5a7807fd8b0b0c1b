package cli

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"conex/internal/build"
	"conex/internal/engine"
)

func (a *app) buildHistoryCommand() *cobra.Command {
	return a.group("history", "Look at past builds", a.buildHistoryLs(), a.buildHistoryInspect(), a.buildHistoryLogs(), a.buildHistoryRm())
}

// buildRow is a line of build history ls; its fields, in the order of their JSON form, are what templates may name.
type buildRow struct {
	Cached, Context, CreatedAt, CreatedSince, Dockerfile, Duration, Error, ID, Image, Name, Status, Steps, Tags, Target string
}

func (a *app) buildHistoryLs() *cobra.Command {
	var format string
	var filters filterFlag
	var noTrunc, quiet bool
	cmd := &cobra.Command{
		Use: "ls [OPTIONS]", Aliases: []string{"list"}, Short: "List builds", Args: a.exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			f := filters.m
			e, err := a.engine()
			if err != nil {
				return err
			}
			builds, err := e.BuildHistory(f)
			if err != nil {
				return err
			}
			if quiet && format == "" {
				format = "{{.ID}}"
			}
			now := time.Now()
			rows := make([]buildRow, len(builds))
			for i, r := range builds {
				rows[i] = rowOf(r, !noTrunc, now)
			}
			head := headings{"ID": "BUILD ID", "Name": "NAME", "Status": "STATUS", "CreatedSince": "CREATED AT", "Duration": "DURATION", "Cached": "CACHED", "CreatedAt": "CREATED AT",
				"Context": "CONTEXT", "Dockerfile": "DOCKERFILE", "Target": "TARGET", "Error": "ERROR", "Image": "IMAGE", "Tags": "TAGS", "Steps": "STEPS"}
			return writeList(a.out, format, `{{.ID}}\t{{.Name}}\t{{.Status}}\t{{.CreatedSince}}\t{{.Duration}}\t{{.Cached}}`, head, rows)
		},
	}
	f := cmd.Flags()
	f.StringVar(&format, "format", "", formatHelp)
	f.Var(&filters, "filter", `Provide filter values (e.g. "status=error")`)
	f.BoolVar(&noTrunc, "no-trunc", false, "Don't truncate output")
	f.BoolVarP(&quiet, "quiet", "q", false, "Only display build IDs")
	return cmd
}

func rowOf(r *build.BuildRecord, trunc bool, now time.Time) buildRow {
	cached, steps := 0, 0
	for _, s := range r.Steps {
		if s.Kind == "" {
			continue
		}
		steps++
		if s.Outcome == build.OutcomeCached || s.Outcome == build.OutcomeUnneeded {
			cached++
		}
	}
	row := buildRow{
		ID: r.ID, Name: buildName(r), Status: engine.BuildStatus(r), CreatedAt: r.Started.Format(time.RFC3339), CreatedSince: ago(r.Started, now), Duration: took(r.Took),
		Cached: fmt.Sprintf("%d/%d", cached, steps), Steps: fmt.Sprint(steps), Context: clean(r.Context), Dockerfile: clean(cmp.Or(r.Dockerfile, "Dockerfile")), Target: r.Target,
		Error: clean(r.Error), Image: string(r.Image), Tags: strings.Join(r.Names, ","),
	}
	if trunc {
		row.Name, row.Image, row.Error = ellipsis(row.Name, 40), short(row.Image), ellipsis(row.Error, 60)
	}
	row.Status = strings.ToUpper(row.Status[:1]) + row.Status[1:]
	return row
}

// buildName calls a build by its context's last part, Dockerfile and target.
func buildName(r *build.BuildRecord) string {
	name := filepath.Base(strings.TrimSuffix(r.Context, "/"))
	if r.Context == "-" {
		name = "stdin"
	}
	if r.Dockerfile != "" && r.Dockerfile != "-" {
		name += "/" + filepath.Base(r.Dockerfile)
	}
	if r.Target != "" {
		name += " (" + r.Target + ")"
	}
	return clean(name)
}

// took is a duration in two or three digits.
func took(d time.Duration) string {
	switch {
	case d < time.Second:
		return fmt.Sprintf("%dms", d.Milliseconds())
	case d < time.Minute:
		return fmt.Sprintf("%.1fs", d.Seconds())
	}
	return d.Round(time.Second).String()
}

func (a *app) buildHistoryInspect() *cobra.Command {
	var format, trace string
	cmd := &cobra.Command{
		Use: "inspect [OPTIONS] [BUILD]", Short: "Show a build, its steps and how long they took (default: the last build)", Args: a.between(0, 1),
		RunE: func(_ *cobra.Command, args []string) error {
			e, err := a.engine()
			if err != nil {
				return err
			}
			r, err := e.FindBuild(first(args))
			if err != nil {
				return err
			}
			if trace != "" {
				return a.writeTrace(e, r.ID, trace)
			}
			if format != "" {
				return writeOne(a.out, format, r)
			}
			return a.printBuild(r)
		},
	}
	f := cmd.Flags()
	f.StringVar(&format, "format", "", formatHelp)
	f.StringVar(&trace, "trace", "", `Write a Chrome trace to a file, or "-", instead`)
	return cmd
}

func first(args []string) string {
	if len(args) == 0 {
		return ""
	}
	return args[0]
}

// writeTrace writes a build's Chrome trace.
func (a *app) writeTrace(e *engine.Engine, id, path string) error {
	r, err := e.FindBuild(id)
	if errors.Is(err, build.ErrNoBuild) {
		return nil // it failed before there was anything to record, and says so
	}
	if err != nil {
		return err
	}
	raw, err := r.Trace()
	if err != nil {
		return err
	}
	if path == "-" {
		_, err = fmt.Fprintf(a.out, "%s\n", raw)
		return err
	}
	if err := os.WriteFile(path, append(raw, '\n'), 0o666); err != nil {
		return fmt.Errorf("write trace: %w", err)
	}
	return nil
}

// timelineWidth is how many characters a build's whole length takes.
const timelineWidth = 40

// printBuild shows a build for people: what it was, and a timeline of its steps.
func (a *app) printBuild(r *build.BuildRecord) error {
	w := bufio.NewWriter(a.out)
	field := func(name, value string) {
		if value != "" {
			fmt.Fprintf(w, "%-12s %s\n", name+":", clean(value))
		}
	}
	field("Build", r.ID)
	field("Context", r.Context)
	field("Dockerfile", cmp.Or(r.Dockerfile, "Dockerfile"))
	field("Target", r.Target)
	field("Platform", r.Platform)
	for _, k := range sortedKeys(r.Args) {
		if v := r.Args[k]; v != nil {
			field("Build arg", k+"="+*v)
		}
	}
	row := rowOf(r, false, time.Now())
	field("Started", r.Started.Local().Format("2006-01-02 15:04:05")+" ("+row.CreatedSince+")")
	field("Duration", row.Duration)
	field("Status", row.Status)
	field("Error", r.Error)
	field("Steps", row.Steps+", "+strings.SplitN(row.Cached, "/", 2)[0]+" cached")
	field("Image", string(r.Image))
	field("Tags", row.Tags)
	fmt.Fprintln(w)
	var critical time.Duration
	for i := range r.Steps {
		s := &r.Steps[i]
		mark := " "
		if slices.Contains(r.Critical, s.Vertex) {
			mark = "*"
			critical += s.Took
		}
		name := clean(strings.SplitN(s.Name, "\n", 2)[0])
		at := ""
		if !s.Started.IsZero() {
			at = fmt.Sprintf("%.2fs", max(0, s.Started.Sub(r.Started)).Seconds())
		}
		fmt.Fprintf(w, "%s #%-3d %-8s %7s %8s |%s| %s\n", mark, s.Vertex, s.Outcome, at, took(s.Took), bar(r, s, mark == "*"), name)
		for _, why := range s.Reasons {
			fmt.Fprintf(w, "%*s not cached: %s\n", 32+timelineWidth, "", clean(why.Text))
		}
		if s.Error != "" {
			fmt.Fprintf(w, "%*s error: %s\n", 32+timelineWidth, "", clean(s.Error))
		}
	}
	fmt.Fprintf(w, "\n* critical path: %s of %s\n", took(critical), took(r.Took))
	for _, l := range r.Warnings {
		fmt.Fprintf(w, "WARNING: %s\n", cleanLines(l))
	}
	return w.Flush()
}

// bar draws a step on the build's time line.
func bar(r *build.BuildRecord, s *build.StepRecord, critical bool) string {
	line := []rune(strings.Repeat(" ", timelineWidth))
	if s.Started.IsZero() || r.Took <= 0 {
		return string(line)
	}
	at := func(t time.Time) int {
		return min(timelineWidth-1, max(0, int(float64(t.Sub(r.Started))/float64(r.Took)*timelineWidth)))
	}
	c := '▒'
	if critical {
		c = '█'
	}
	for i := at(s.Started); i <= at(s.Started.Add(s.Took-1)); i++ {
		line[i] = c
	}
	return string(line)
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

func (a *app) buildHistoryLogs() *cobra.Command {
	var progress string
	cmd := &cobra.Command{
		Use: "logs [OPTIONS] [BUILD] [STEP]", Short: "Print what the steps of a build printed (default: the last build, all steps)", Args: a.between(0, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			e, err := a.engine()
			if err != nil {
				return err
			}
			var step string
			r, err := e.FindBuild(first(args))
			switch {
			case len(args) == 2:
				step = args[1]
			case len(args) == 1 && err != nil: // a step of the last build
				last, lerr := e.FindBuild("")
				if lerr != nil {
					return err
				}
				if _, serr := last.Step(args[0]); serr != nil {
					return err
				}
				r, err, step = last, nil, args[0]
			}
			if err != nil {
				return err
			}
			var s *build.StepRecord
			if step != "" {
				if s, err = r.Step(step); err != nil {
					return err
				}
			}
			entries, err := e.BuildLog(r, s)
			if err != nil {
				return err
			}
			w := bufio.NewWriter(a.out)
			var show build.Display
			switch progress {
			case "plain":
				show = newPlainDisplay(w, true).event
			case "json":
				show = (&jsonBuild{out: w, began: r.Started}).event
			case "raw":
				for _, en := range entries {
					if en.Skipped > 0 {
						fmt.Fprintf(w, "[%s left out]\n", units.HumanSize(float64(en.Skipped)))
					}
					fmt.Fprint(w, en.Text)
				}
				return w.Flush()
			default:
				return a.usageError(cmd, fmt.Errorf("invalid progress mode %s: must be one of \"plain\", \"json\" or \"raw\"", progress))
			}
			for _, ev := range r.Replay(s, entries) {
				show(ev)
			}
			return w.Flush()
		},
	}
	cmd.Flags().StringVar(&progress, "progress", "plain", `Form of the output ("plain", "json", "raw": what the commands wrote alone)`)
	return cmd
}

func (a *app) buildHistoryRm() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use: "rm [OPTIONS] [BUILD...]", Aliases: []string{"remove"}, Short: "Remove builds from the history", Args: a.atLeast(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			if all == (len(args) > 0) {
				return a.usageError(cmd, errors.New("give the builds to remove, or --all"))
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			gone, err := e.ForgetBuilds(args, all)
			for _, id := range gone {
				fmt.Fprintln(a.out, id)
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "Remove all builds")
	return cmd
}
