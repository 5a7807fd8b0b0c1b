package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"conex/internal/engine"
)

const pauseHelp = "Pause containers that run with the volume meanwhile"

func (a *app) volumeSnapshotCommand() *cobra.Command {
	pause := true
	cmd := &cobra.Command{
		Use: "snapshot [OPTIONS] VOLUME [NAME]", Short: "Keep a volume's content as it is now", Args: a.between(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			req := engine.VolumeSnapshotRequest{Volume: args[0], NoPause: !pause}
			if len(args) > 1 {
				req.Snapshot = args[1]
			}
			return a.withEngine(cmd, func(ctx context.Context, e *engine.Engine) error {
				name, err := e.SnapshotVolume(ctx, req)
				if err != nil {
					return err
				}
				fmt.Fprintln(a.out, name)
				return nil
			})
		},
	}
	cmd.Flags().BoolVarP(&pause, "pause", "p", true, pauseHelp)
	return cmd
}

func (a *app) volumeSnapshotsCommand() *cobra.Command {
	var quiet bool
	var format string
	cmd := &cobra.Command{
		Use: "snapshots [OPTIONS] [VOLUME...]", Short: "List snapshots of volumes", Args: a.atLeast(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			e, err := a.engine()
			if err != nil {
				return err
			}
			list, err := e.VolumeSnapshots(cmd.Context(), args)
			if err != nil {
				return err
			}
			now := time.Now()
			var rows []snapshotRow
			for _, s := range list {
				rows = append(rows, snapshotRow{s.Created.Local().Format(time.RFC3339), ago(s.Created, now), s.Volume + "@" + s.Name, s.Volume})
			}
			if quiet && format == "" {
				format = "{{.Name}}"
			}
			head := headings{"CreatedAt": "CREATED AT", "CreatedSince": "CREATED", "Name": "SNAPSHOT", "Volume": "VOLUME"}
			return writeList(a.out, format, `{{.Name}}\t{{.CreatedSince}}`, head, rows)
		},
	}
	cmd.Flags().StringVar(&format, "format", "", formatHelp)
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "Only display names")
	return cmd
}

// snapshotRow is a line of volume snapshots; its fields are what templates may name.
type snapshotRow struct{ CreatedAt, CreatedSince, Name, Volume string }

func (a *app) volumeCloneCommand() *cobra.Command {
	pause := true
	cmd := &cobra.Command{
		Use: "clone [OPTIONS] VOLUME[@SNAPSHOT] NAME", Short: "Make a new volume of another one's content, or of a snapshot", Args: a.exactly(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withEngine(cmd, func(ctx context.Context, e *engine.Engine) error {
				if err := e.CloneVolume(ctx, args[0], args[1], !pause); err != nil {
					return err
				}
				fmt.Fprintln(a.out, args[1])
				return nil
			})
		},
	}
	cmd.Flags().BoolVarP(&pause, "pause", "p", true, pauseHelp)
	return cmd
}

func (a *app) volumeRestoreCommand() *cobra.Command {
	var keep string
	cmd := &cobra.Command{
		Use: "restore [OPTIONS] VOLUME@SNAPSHOT", Short: "Put a snapshot's content in the place of its volume's", Args: a.exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			name, snapshot, ok := strings.Cut(args[0], "@")
			if !ok {
				return fmt.Errorf("%s is no snapshot: name one as VOLUME@SNAPSHOT ('%s volume snapshots %s' lists them)", args[0], a.name, args[0])
			}
			return a.withEngine(cmd, func(ctx context.Context, e *engine.Engine) error {
				return e.RestoreVolume(ctx, name, snapshot, keep)
			})
		},
	}
	cmd.Flags().StringVar(&keep, "keep", "", "Keep the present content as a snapshot of this name")
	return cmd
}

func (a *app) volumeExportCommand() *cobra.Command {
	var output, compression string
	pause := true
	cmd := &cobra.Command{
		Use: "export [OPTIONS] VOLUME[@SNAPSHOT]", Short: "Export a volume's content as a tar archive", Args: a.exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if _, tty := terminal(a.out); tty && output == "" {
				return errTerminalTar
			}
			if compression == "" {
				compression = compressionOf(output)
			}
			return a.withEngine(cmd, func(ctx context.Context, e *engine.Engine) error {
				return a.output(output, func(w io.Writer) error {
					return e.ExportVolume(ctx, engine.VolumeExportRequest{Volume: args[0], Output: w, Compression: compression, NoPause: !pause, Torn: func(path string) {
						fmt.Fprintf(a.err, "%s: /%s was cut off while it was read: it ends with zeros in the archive\n", a.name, path)
					}})
				})
			})
		},
	}
	f := cmd.Flags()
	f.StringVarP(&output, "output", "o", "", "Write to a file, instead of STDOUT; .tar.gz, .tgz, .tar.zst and .tzst are compressed")
	f.StringVar(&compression, "compression", "", `Compress with "gzip" or "zstd", or "none"`)
	f.BoolVarP(&pause, "pause", "p", true, pauseHelp)
	return cmd
}

// compressionOf is what a file's name says, "" for nothing.
func compressionOf(name string) string {
	for _, k := range []struct{ suffix, kind string }{{".gz", "gzip"}, {".tgz", "gzip"}, {".zst", "zstd"}, {".tzst", "zstd"}, {".zstd", "zstd"}} {
		if strings.HasSuffix(strings.ToLower(name), k.suffix) {
			return k.kind
		}
	}
	return ""
}

func (a *app) volumeImportCommand() *cobra.Command {
	var replace bool
	var keep string
	cmd := &cobra.Command{
		Use: "import [OPTIONS] VOLUME [FILE|-]", Short: "Make a tar archive a volume's content", Args: a.between(1, 2),
		Long: "Make a tar archive, plain or compressed with gzip, zstd, bzip2 or xz, the content\nof a volume. A volume that does not exist is made. One that has data stays as it\nis unless --replace or --keep is given.",
		RunE: func(cmd *cobra.Command, args []string) error {
			req := engine.VolumeImportRequest{Volume: args[0], Input: a.in, Replace: replace || keep != "", Keep: keep}
			if len(args) > 1 && args[1] != "-" {
				f, err := os.Open(args[1])
				if err != nil {
					return err
				}
				defer f.Close()
				if fi, err := f.Stat(); err == nil && fi.IsDir() {
					return fmt.Errorf("%s is a folder: conex volume import wants a tar archive (tar -C %s -c . | %s volume import %s -)", args[1], args[1], a.name, args[0])
				}
				req.Input = f
			} else if _, tty := terminal(a.in); tty {
				return errors.New("a terminal has no archive: name a file, or redirect standard input")
			}
			return a.withEngine(cmd, func(ctx context.Context, e *engine.Engine) error {
				if err := e.ImportVolume(ctx, req); err != nil {
					return err
				}
				fmt.Fprintln(a.out, args[0])
				return nil
			})
		},
	}
	f := cmd.Flags()
	f.BoolVar(&replace, "replace", false, "Put the archive in the place of what the volume has")
	f.StringVar(&keep, "keep", "", "Replace, and keep the present content as a snapshot of this name")
	return cmd
}

func (a *app) volumeDuCommand() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use: "du [OPTIONS] [VOLUME...]", Short: "Show what volumes take on the disk", Args: a.atLeast(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withEngine(cmd, func(ctx context.Context, e *engine.Engine) error {
				list, err := e.VolumeUsage(ctx, engine.VolumeUsageRequest{Volumes: args})
				if err != nil {
					return err
				}
				var rows []duRow
				for _, v := range list {
					rows = append(rows, rowOfUsage(v))
				}
				head := headings{"Disk": "ON DISK", "Files": "FILES", "Limit": "LIMIT", "Links": "LINKS", "Name": "VOLUME NAME", "Shared": "SHARED", "Size": "SIZE",
					"Snapshots": "SNAPSHOTS"}
				return writeList(a.out, format, `{{.Name}}\t{{.Links}}\t{{.Files}}\t{{.Size}}\t{{.Disk}}\t{{.Shared}}\t{{.Snapshots}}\t{{.Limit}}`, head, rows)
			})
		},
	}
	cmd.Flags().StringVar(&format, "format", "", formatHelp)
	return cmd
}

// duRow is a line of volume du; its fields, in the order of their JSON form, are what templates may name.
type duRow struct {
	Disk          string
	DiskBytes     int64
	Files         int64
	Limit         string
	LimitBytes    int64
	Links         int
	Name          string
	Shared        string
	SharedBytes   int64
	Size          string
	SizeBytes     int64
	SnapshotBytes int64
	SnapshotCount int
	Snapshots     string
}

func rowOfUsage(v engine.VolumeSpace) duRow {
	r := duRow{Disk: sizeOf(v.Disk), DiskBytes: v.Disk, Files: v.Files, Limit: "-", LimitBytes: v.Limit, Links: v.Links, Name: v.Name, Shared: "-", SharedBytes: max(v.Shared, 0),
		Size: sizeOf(v.Size), SizeBytes: v.Size, SnapshotBytes: v.SnapshotDisk, SnapshotCount: v.Snapshots, Snapshots: "-"}
	if v.Limit > 0 {
		r.Limit = sizeOf(v.Limit)
	}
	if v.Shared >= 0 {
		r.Shared = sizeOf(v.Shared)
	}
	if v.Snapshots > 0 {
		r.Snapshots = fmt.Sprintf("%d (%s)", v.Snapshots, sizeOf(v.SnapshotDisk))
		if v.SnapshotShared > 0 {
			r.Snapshots = fmt.Sprintf("%d (%s, %s shared)", v.Snapshots, sizeOf(v.SnapshotDisk), sizeOf(v.SnapshotShared))
		}
	}
	return r
}
