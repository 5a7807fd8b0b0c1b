package cli

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"conex/internal/analyze"
)

func (a *app) imageDiffCommand() *cobra.Command {
	var opt analyze.DiffOptions
	var format, only, platform string
	var exitCode, quiet bool
	cmd := &cobra.Command{
		Use: "diff [OPTIONS] IMAGE IMAGE", Short: "Show how two images differ in files and config", Args: a.exactly(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case format != "" && format != "json":
				return a.usageError(cmd, errors.New("--format knows json only"))
			case only != "" && only != "files" && only != "config":
				return a.usageError(cmd, fmt.Errorf("--only %s: there are files and config", only))
			}
			opt.NoFiles, opt.NoConfig = only == "config", only == "files"
			err := a.imageDiff(cmd, args, opt, format, platform, exitCode, quiet)
			var ee *exitError
			if (exitCode || quiet) && err != nil && !errors.As(err, &ee) {
				return &exitError{code: 2, err: err} // 1 says that they differ
			}
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&format, "format", "", "Print the differences as \"json\"")
	f.StringVar(&only, "only", "", `Compare "files" or "config" alone`)
	f.StringVar(&platform, "platform", "", platformHelp)
	f.BoolVar(&opt.Times, "times", false, "Count modification times and the images' creation as differences")
	f.BoolVar(&exitCode, "exit-code", false, "Exit with 1 if the images differ, 2 if something went wrong")
	f.BoolVarP(&quiet, "quiet", "q", false, "Print nothing; implies --exit-code")
	return cmd
}

func (a *app) imageDiff(cmd *cobra.Command, args []string, opt analyze.DiffOptions, format, platform string, exitCode, quiet bool) error {
	e, err := a.engine()
	if err != nil {
		return err
	}
	ctx, stop := a.interruptible(cmd.Context())
	defer stop()
	d, err := e.DiffImages(ctx, args[0], args[1], platform, opt)
	if err != nil {
		return err
	}
	switch {
	case quiet:
	case format == "json":
		err = d.WriteJSON(a.out)
	default:
		err = printDiff(a.out, d, opt.NoFiles)
	}
	if err == nil && (exitCode || quiet) && !d.Equal() {
		return exit(1)
	}
	return err
}

// printDiff shows a difference for people: the letters are Docker's, for what B has and A has not.
func printDiff(out io.Writer, d *analyze.Difference, noFiles bool) error {
	w := bufio.NewWriter(out)
	for _, s := range []struct {
		sign string
		img  *analyze.Image
	}{{"---", d.A}, {"+++", d.B}} {
		name := short(string(s.img.ID))
		if len(s.img.Tags) > 0 {
			name = s.img.Tags[0] + "  " + name
		}
		fmt.Fprintf(w, "%s %s  %s in %s, %d shared\n", s.sign, name, humanSize(s.img.Size), countOf(len(s.img.Layers), "layer", "layers"), d.Shared)
	}
	for _, c := range d.Config {
		key := analyze.Printable(c.Key)
		switch {
		case c.A == nil:
			fmt.Fprintf(w, "config + %s\n", keyValue(key, c.B))
		case c.B == nil:
			fmt.Fprintf(w, "config - %s\n", keyValue(key, c.A))
		default:
			fmt.Fprintf(w, "config   %s: %s -> %s\n", key, configValue(c.A), configValue(c.B))
		}
	}
	for _, f := range d.Files {
		fmt.Fprintf(w, "%c /%s%s\n", f.Change.Letter(), analyze.Printable(f.Path), fileWords(f))
	}
	if !noFiles {
		fmt.Fprintf(w, "%d added, %d changed, %d removed\n", d.Added, d.Changed, d.Removed)
	}
	return w.Flush()
}

func keyValue(key string, v any) string {
	if s := configValue(v); s != "" {
		return key + ": " + s
	}
	return key
}

func configValue(v any) string {
	switch v := v.(type) {
	case string:
		return analyze.Printable(v)
	case bool:
		return "" // an entry of a set
	}
	s, err := toJSON(v)
	if err != nil {
		return "?"
	}
	return analyze.Line(s)
}

// fileWords says what differs about a file, in parentheses.
func fileWords(f analyze.FileDifference) string {
	if f.Change != analyze.Changed {
		s := f.A
		if s == nil {
			s = f.B
		}
		switch {
		case s.IsRegular():
			return " (" + humanSize(s.Size) + ")"
		case s.Target != "":
			return " (-> " + analyze.Printable(s.Target) + ")"
		}
		return ""
	}
	var parts []string
	for _, what := range f.What {
		var x, y string
		switch what {
		case "type":
			x, y = f.A.Type(), f.B.Type()
		case "size":
			x, y = fmt.Sprint(f.A.Size), fmt.Sprint(f.B.Size)
		case "mode":
			x, y = fmt.Sprintf("%04o", f.A.Mode&0o7777), fmt.Sprintf("%04o", f.B.Mode&0o7777)
		case "owner":
			x, y = fmt.Sprintf("%d:%d", f.A.UID, f.A.GID), fmt.Sprintf("%d:%d", f.B.UID, f.B.GID)
		case "target":
			x, y = analyze.Printable(f.A.Target), analyze.Printable(f.B.Target)
		case "device":
			x, y = fmt.Sprintf("%d:%d", f.A.Major, f.A.Minor), fmt.Sprintf("%d:%d", f.B.Major, f.B.Minor)
		case "time":
			x, y = modTime(f.A), modTime(f.B)
		case "xattrs":
			parts = append(parts, "xattrs "+strings.Join(xattrNames(f.A, f.B), " "))
			continue
		default:
			parts = append(parts, what)
			continue
		}
		parts = append(parts, fmt.Sprintf("%s %s -> %s", what, x, y))
	}
	return " (" + strings.Join(parts, ", ") + ")"
}

func modTime(s *analyze.State) string { return time.Unix(0, s.ModTime).UTC().Format(time.RFC3339) }

// xattrNames are the extended attributes that differ.
func xattrNames(a, b *analyze.State) []string {
	var names []string
	for _, s := range [][2]*analyze.State{{a, b}, {b, a}} {
		for _, x := range s[0].Xattrs {
			if !slices.Contains(s[1].Xattrs, x) && !slices.Contains(names, analyze.Printable(x.Name)) {
				names = append(names, analyze.Printable(x.Name))
			}
		}
	}
	return names
}
