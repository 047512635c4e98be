"""The attention benchmark: shapes, contenders, checks against float64, and times taken on the device."""
