package cli

import (
	"fmt"
	"io"
	"time"

	"github.com/docker/go-units"
	apii "github.com/moby/moby/api/types/image"
	"github.com/spf13/cobra"

	"conex/internal/engine"
)

func (a *app) dfCommand() *cobra.Command {
	var format string
	var verbose bool
	cmd := &cobra.Command{
		Use: "df [OPTIONS]", Short: "Show disk usage", Args: a.exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			e, err := a.engine()
			if err != nil {
				return err
			}
			u, err := e.DiskUsage(cmd.Context())
			if err != nil {
				return err
			}
			switch {
			case verbose && format != "" && format != "table":
				return writeOne(a.out, format, u)
			case verbose:
				return a.printDiskUsage(u)
			}
			head := headings{"Type": "TYPE", "TotalCount": "TOTAL", "Active": "ACTIVE", "Size": "SIZE", "Reclaimable": "RECLAIMABLE"}
			return writeList(a.out, format, `{{.Type}}\t{{.TotalCount}}\t{{.Active}}\t{{.Size}}\t{{.Reclaimable}}`, head, dfRows(u))
		},
	}
	cmd.Flags().StringVar(&format, "format", "", formatHelp)
	cmd.Flags().BoolVarP(&verbose, "verbose", "v", false, "Show detailed information on space usage")
	return cmd
}

// dfRow is a line of system df; its fields, in the order of their JSON form, are what templates may name.
type dfRow struct {
	Active, Reclaimable string
	ReclaimableBytes    int64
	Size                string
	SizeBytes           int64
	TotalCount, Type    string
}

func dfRows(u engine.DiskUsage) []dfRow {
	row := func(name string, x engine.Usage, percent bool) dfRow {
		r := dfRow{Type: name, TotalCount: fmt.Sprint(x.Total), Active: fmt.Sprint(x.Active), Size: dfSize(x.Size), Reclaimable: dfSize(x.Reclaimable),
			SizeBytes: x.Size, ReclaimableBytes: x.Reclaimable}
		if percent && x.Size > 0 {
			r.Reclaimable += fmt.Sprintf(" (%d%%)", x.Reclaimable*100/x.Size)
		}
		return r
	}
	return []dfRow{
		row("Images", u.Images, true), row("Containers", u.Containers, true), row("Local Volumes", u.Volumes, true), row("Build Cache", u.BuildCache, false),
		row("Other", u.Other, false),
	}
}

func dfSize(n int64) string { return units.HumanSizeWithPrecision(float64(n), 4) }

func sizeOf(n int64) string { return units.HumanSizeWithPrecision(float64(n), 3) }

func ago(t, now time.Time) string {
	if t.IsZero() {
		return "N/A"
	}
	return units.HumanDuration(max(0, now.Sub(t))) + " ago"
}

// The lines of the tables of system df -v. SIZE is the length of files, ON DISK what they take.
type (
	dfImage     struct{ Repository, Tag, ID, CreatedSince, Size, SharedSize, UniqueSize, Containers, Disk string }
	dfContainer struct{ ID, Image, Command, LocalVolumes, Size, Disk, RunningFor, Status, Names string }
	dfVolume    struct{ Name, Links, Size, Disk string }
	dfCache     struct{ ID, CacheType, Size, Disk, CreatedSince, LastUsedSince, Shared, Description string }
	dfOther     struct{ What, Count, Disk, Reclaimable string }
)

func (a *app) printDiskUsage(u engine.DiskUsage) error {
	now := time.Now()
	var images []dfImage
	for _, i := range u.ImageList {
		sum := []apii.Summary{{ID: string(i.ID), RepoTags: i.RepoTags, RepoDigests: i.RepoDigests, Containers: -1, SharedSize: -1}}
		for _, r := range imageRows(sum, true, false, now) {
			images = append(images, dfImage{r.Repository, r.Tag, r.ID, ago(i.Created, now), sizeOf(i.Size), sizeOf(i.Shared), sizeOf(i.Unique), fmt.Sprint(i.Containers),
				sizeOf(i.Disk)})
		}
	}
	var containers []dfContainer
	for _, c := range u.ContainerList {
		containers = append(containers, dfContainer{short(c.ID), c.Image, `"` + ellipsis(c.Command, 20) + `"`, fmt.Sprint(c.LocalVolumes), sizeOf(c.Size), sizeOf(c.Disk),
			ago(c.Created, now), c.Status, c.Name})
	}
	var volumes []dfVolume
	for _, v := range u.VolumeList {
		volumes = append(volumes, dfVolume{v.Name, fmt.Sprint(v.Links), sizeOf(v.Size), sizeOf(v.Disk)})
	}
	var cache []dfCache
	for _, c := range u.CacheList {
		cache = append(cache, dfCache{short(c.ID), c.Type, sizeOf(c.Size), sizeOf(c.Disk), ago(c.Created, now), ago(c.LastUsed, now), fmt.Sprint(c.Shared), ellipsis(c.Title, 45)})
	}
	var other []dfOther
	for _, o := range u.OtherList {
		other = append(other, dfOther{o.What, fmt.Sprint(o.Total), sizeOf(o.Size), sizeOf(o.Reclaimable)})
	}
	p := &sections{out: a.out}
	section(p, "Images space usage:", `{{.Repository}}\t{{.Tag}}\t{{.ID}}\t{{.CreatedSince}}\t{{.Size}}\t{{.SharedSize}}\t{{.UniqueSize}}\t{{.Containers}}\t{{.Disk}}`, images)
	section(p, "Containers space usage:", `{{.ID}}\t{{.Image}}\t{{.Command}}\t{{.LocalVolumes}}\t{{.Size}}\t{{.Disk}}\t{{.RunningFor}}\t{{.Status}}\t{{.Names}}`, containers)
	section(p, "Local Volumes space usage:", `{{.Name}}\t{{.Links}}\t{{.Size}}\t{{.Disk}}`, volumes)
	section(p, "Build cache usage: "+dfSize(u.BuildCache.Size), `{{.ID}}\t{{.CacheType}}\t{{.Size}}\t{{.Disk}}\t{{.CreatedSince}}\t{{.LastUsedSince}}\t{{.Shared}}\t{{.Description}}`, cache)
	section(p, "Everything else: "+dfSize(u.Other.Size), `{{.What}}\t{{.Count}}\t{{.Disk}}\t{{.Reclaimable}}`, other)
	if p.err != nil {
		return p.err
	}
	_, err := fmt.Fprintf(a.out, "Total: %s (%d bytes), of which system prune -a --volumes frees %s.\n", dfSize(u.Size), u.Size, dfSize(u.Reclaimable))
	return err
}

// sections prints tables one below the other and remembers the first error.
type sections struct {
	out io.Writer
	err error
}

func section[T any](p *sections, title, def string, rows []T) {
	if p.err != nil {
		return
	}
	head := headings{
		"Repository": "REPOSITORY", "Tag": "TAG", "ID": "IMAGE ID", "CreatedSince": "CREATED", "Size": "SIZE", "SharedSize": "SHARED SIZE", "UniqueSize": "UNIQUE SIZE",
		"Containers": "CONTAINERS", "Disk": "ON DISK", "Image": "IMAGE", "Command": "COMMAND", "LocalVolumes": "LOCAL VOLUMES", "RunningFor": "CREATED", "Status": "STATUS",
		"Names": "NAMES", "Name": "VOLUME NAME", "Links": "LINKS", "CacheType": "CACHE TYPE", "LastUsedSince": "LAST USED", "Shared": "SHARED",
		"Description": "DESCRIPTION", "What": "WHAT", "Count": "COUNT", "Reclaimable": "RECLAIMABLE",
	}
	var row T
	switch any(row).(type) {
	case dfContainer:
		head["ID"] = "CONTAINER ID"
	case dfCache:
		head["ID"] = "CACHE ID"
	}
	if _, p.err = fmt.Fprint(p.out, title, "\n\n"); p.err == nil {
		p.err = writeList(p.out, "", def, head, rows)
	}
	if p.err == nil {
		_, p.err = fmt.Fprintln(p.out)
	}
}
